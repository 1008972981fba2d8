"""Scoring stored responses: prefix-shared rows give what one by one gives; unreadable answers; other reward models."""

from dataclasses import replace

import pytest
import torch
from tiny_stages import MODEL, job, write_prompts, write_reward_model

from postgrad.alignment.responses import RESPONSES, make_row, read_counts
from postgrad.alignment.scoring import Scorer, load_scorer, score_responses, split_tree
from postgrad.core.config import DataConfig, ModelConfig
from postgrad.core.data import Prompt, load_prompts
from postgrad.core.rows import Tree
from postgrad.core.store import read_store, seal, store_hash, write_shard
from postgrad.core.text import encode_answer, encode_prompt

DATA = DataConfig(max_length=64)
PROMPT = ({"role": "user", "content": "copy mako"},)


@pytest.fixture
def scorer(tmp_path) -> Scorer:
    return load_scorer(replace(MODEL, path=write_reward_model(tmp_path / "rm")), job(tmp_path / "job"), DATA)


def alone(scorer: Scorer, answer: str) -> float:
    tokens = (*encode_prompt(scorer.tokenizer, PROMPT), *encode_answer(scorer.tokenizer, PROMPT, answer))
    with torch.no_grad():
        return float(scorer.model(torch.tensor([tokens])).logits[0, 0])


def test_shared_rows_score_as_one_by_one(scorer):
    answers = ("mako", "", "kam", "mako", "abcdefgh")
    other = ({"role": "user", "content": "reverse tilu"},)
    found = scorer.score([(PROMPT, answers), (other, ("ulit",))])
    assert found[0] == pytest.approx([alone(scorer, answer) for answer in answers], abs=1e-5)
    assert found[0][0] == found[0][3] and len(found[1]) == 1


def test_split_trees_score_the_same(scorer, monkeypatch):
    answers = tuple("abcdefghij"[:i] for i in range(1, 10))
    whole = scorer.score([(PROMPT, answers)])
    monkeypatch.setattr("postgrad.alignment.scoring.ROW_TOKENS", 30)
    assert scorer.score([(PROMPT, answers)])[0] == pytest.approx(whole[0], abs=1e-5)


def test_split_tree():
    tree = Tree(prompt=(1, 2), answers=((3,) * 4, (4,) * 4, (5,) * 9, (6,)))
    parts = split_tree(tree, 10)
    assert [part.answers for part in parts] == [((3,) * 4, (4,) * 4), ((5,) * 9,), ((6,),)]
    assert {part.prompt for part in parts} == {(1, 2)}


def test_what_cannot_be_read_is_nan_and_the_rest_is_scored(scorer):
    found = scorer.score([(PROMPT, ("mako", "x" * 100)), (PROMPT, ("y" * 100,)), (PROMPT, ("a<|user|>b", "kam"))])
    assert found[0][0] == pytest.approx(alone(scorer, "mako"), abs=1e-5)
    assert [[value != value for value in own] for own in found] == [[False, True], [True], [True, False]]


def store(tmp_path, texts: list[list[str]]):
    prompts: list[Prompt] = load_prompts(write_prompts(tmp_path / "prompts.jsonl", len(texts))).items
    folder = tmp_path / "run"
    rows = [
        make_row(prompt, k, text, k, "policy")
        | {"token_ids": [], "n_tokens": 1, "finish_reason": "stop", "logprob_sum": 0.0}
        for prompt, own in zip(prompts, texts, strict=True)
        for k, text in enumerate(own)
    ]
    write_shard(folder / "responses", 0, rows, RESPONSES)
    seal(folder / "responses", stage="sample", settings={}, parents={}, counts={})
    return folder


def test_the_store_of_scores(scorer, tmp_path):
    folder = store(tmp_path, [["ab", "x" * 100, "cd"], ["y" * 100, "y" * 100, "z" * 100]])
    assert score_responses(folder, scorer) == {"scores": 6, "answers the reward model could not read": 4}
    rows = read_store(folder / "scores")
    scores = [row["score"] for row in rows]
    assert scores[1] == min(scores[0], scores[2]) and scores[3:] == [0.0, 0.0, 0.0]
    assert [row["readable"] for row in rows] == [True, False, True, False, False, False]
    assert {row["rm_hash"] for row in rows} == {scorer.hash}


def test_the_same_reward_model_does_nothing_and_another_takes_the_place(scorer, tmp_path, monkeypatch):
    folder = store(tmp_path, [["ab", "cd"]])
    score_responses(folder, scorer)
    before = store_hash(folder / "scores")
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", lambda *_: pytest.fail("scored again"))
        score_responses(folder, scorer)
    path = write_reward_model(tmp_path / "rm2", seed=1)
    other = load_scorer(ModelConfig(path=path), job(tmp_path / "job"), DATA)
    score_responses(folder, other)
    assert store_hash(folder / "scores") != before and read_counts(folder / "scores")["scores"] == 2
    assert {row["rm_hash"] for row in read_store(folder / "scores")} == {other.hash}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
