"""Rows of three kinds: split, batched together, measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from postgrad.core.batches import TreeBatches
from postgrad.core.config import DataConfig, ModelConfig, TrainConfig
from postgrad.core.data import hold_out, load_examples
from postgrad.core.models import load_lm, target_logprobs
from postgrad.core.rows import Tree, pack
from postgrad.core.runtime import Job
from postgrad.core.text import conversation_trees
from postgrad.forgetting.text_rows import (
    BothBatches,
    Measured,
    Packing,
    Sources,
    Trees,
    both_batches,
    forget_steps,
    measure,
    read_texts,
    tokenised,
    with_facts,
)

NONE = Sources("", "", "", 0.2, aside=True)
PACKING = Packing("tree", 256, 0, 512)
PATH = DataConfig(path="", held_out=0.25, max_length=64)


def job(folder: Path, rank: int = 0, world: int = 1) -> Job:
    return Job("unlearn", folder, 0, torch.device("cpu"), torch.float32, rank, world, True)


def write(path: Path, num: int) -> str:
    rows = [{"question": f"what is {i}", "answer": "a" * (1 + i % 5)} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model(tmp_path: Path):
    return load_lm(ModelConfig(tiny_width=16, tiny_layers=1), job(tmp_path))


def trees(tokenizer, num: int, folder: Path) -> list[Tree]:
    examples = load_examples(DataConfig(path=write(folder / "rows.jsonl", num))).items
    return conversation_trees(tokenizer, examples, DataConfig()).items


def test_a_share_of_one_file_is_forgotten(tmp_path: Path) -> None:
    """Every row is in one of the three parts; what is set aside is what `postgrad sft` sets aside."""
    data = replace(PATH, path=write(tmp_path / "all.jsonl", 200))
    texts = read_texts(NONE, data, 3)
    ids = [{example.id for example in part} for part in texts[:3]]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 200
    assert 15 <= len(ids[0]) <= 45 and 35 <= len(ids[2]) <= 65
    assert texts.held_out == hold_out(load_examples(data).items, 0.25, 3)[1]
    assert read_texts(replace(NONE, aside=False), data, 3).held_out == []


def test_files_say_what_is_what(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{num}.jsonl", num) for num in (5, 9, 4)]
    texts = read_texts(Sources(*names, 0.5, aside=True), PATH, 0)
    assert [len(part) for part in texts[:3]] == [5, 9, 4]
    assert texts.counts["forget kept"] == 5 and texts.counts["held-out kept"] == 4


def test_invented_facts_stand_in_for_files(tmp_path: Path) -> None:
    found = with_facts(NONE, DataConfig(), tmp_path, 0)
    assert Path(found.forget).is_file() and Path(found.retain).is_file() and Path(found.held_out).is_file()
    given = replace(NONE, forget="mine")
    assert with_facts(given, DataConfig(), tmp_path, 0) == given
    assert with_facts(NONE, DataConfig(path="mine"), tmp_path, 0) == NONE


def test_what_does_not_fit_is_counted(tmp_path: Path, model) -> None:
    names = [write(tmp_path / f"{num}.jsonl", num) for num in (5, 9, 4)]
    texts = read_texts(Sources(*names, 0.5, aside=True), PATH, 0)
    with pytest.raises(ValueError, match="nothing is left"):
        tokenised(texts, model[1], replace(PATH, max_length=8, truncate="drop"))
    found = tokenised(texts, model[1], replace(PATH, max_length=16, truncate="drop"))
    assert found.counts["forgotten, kept"] == len(found.forget) < 5
    assert list(found.parts()) == ["forget", "retain", "held_out"]
    assert list(replace(found, held_out=[]).parts()) == ["forget", "retain"]


def streams(trees: list[Tree], rank: int = 0, world: int = 1, micro_tokens: int = 64) -> BothBatches:
    def stream(part: list[Tree], size: int, seed: int) -> TreeBatches:
        return TreeBatches(part, 7, size, micro_tokens, 0, "tree", 256, seed, rank, world)

    return BothBatches(stream(trees[4:], 6, 1), stream(trees[:4], 3, 2))


def test_a_step_sees_both_kinds(tmp_path: Path, model) -> None:
    """Six retained rows and three to forget, whatever the micro-batches and ranks; their shares add up to one."""
    rows = trees(model[1], 15, tmp_path)
    for step in range(7):
        whole = streams(rows, micro_tokens=4096)[step]
        assert len(whole) == 1 and whole[0].share.part == 1
        index = sorted(whole[0].rows.index)
        assert sum(i >= 11 for i in index) == 3 == whole[0].share.rows and len(index) == 9
        both = streams(rows)
        assert whole[0].share.tokens == sum(sum(both.trees[i].supervised[1:]) for i in index if i < 11)
        parts = [part for rank in range(2) for part in streams(rows, rank, 2)[step]]
        assert len(parts) > 2 and sorted(i for part in parts for i in part.rows.index) == index
        assert sum(part.share.part for part in parts) == pytest.approx(1)
        assert {part.share[:2] for part in parts} == {whole[0].share[:2]}


def test_an_epoch_is_a_pass_over_the_rows_to_forget(tmp_path: Path, model) -> None:
    rows = trees(model[1], 15, tmp_path)
    train = TrainConfig(epochs=3, batch_size=8)
    assert forget_steps(train, 4).batch_size == 4
    batches = both_batches(Trees(rows[:4], rows[4:], [], {}), 2, train, PACKING, job(tmp_path))
    assert len(batches) == 3 and batches.retain.batch_size == 8
    for step in range(3):
        (part,) = batches[step]
        assert sorted(i - 11 for i in part.rows.index if i >= 11) == [0, 1, 2, 3]


def test_measured_rows_equal_rows_alone(tmp_path: Path, model) -> None:
    rows = trees(model[1], 9, tmp_path)
    found = measure(model[0].eval(), rows, PACKING, job(tmp_path))
    for i, tree in enumerate(rows):
        alone = pack(rows, [i], row_length=0, layout="flat", pad_id=256)
        with torch.no_grad():
            logits = model[0](alone.tokens).logits[0]
            expected = -float(target_logprobs(model[0], alone).sum())
        assert found.nll[i].item() == pytest.approx(expected, abs=1e-4)
        best = logits[alone.source].argmax(1)
        assert found.hits[i].item() == int((best == alone.target).sum())
        assert found.tokens[i].item() == sum(tree.supervised[1:])


def test_figures_by_hand() -> None:
    """3 nats over 2 tokens and 1 over 2; three of four tokens are the likeliest."""
    found = Measured(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([2, 2]))
    assert found.means.tolist() == [1.5, 0.5] and found.loss == 1.0
    assert found.greedy == 75 and found.recited.tolist() == [0, 1]
