"""Rows of real lengths as token ids, the same for every system: HH pairs, AlpacaEval answers, instructions.

Texts are cut into pieces of about the size of a BPE token and each piece is hashed into the vocabulary. Where the
texts are absent, ids are drawn at random with lengths from the texts' own quantiles.
"""

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from postgrad.core.rows import Tree

PAD, STOP, FIRST = 0, 1, 2
MAX_LENGTH = 1024
PIECE = re.compile(r"\s?\w{1,6}|\s?[^\w\s]{1,3}|\s+")
LEVELS = (0, 10, 25, 50, 75, 90, 100)
QUANTILES = {  # tokens of prompt and of each answer at LEVELS, measured on the texts
    "hh": ((10, 18, 33, 99, 177, 290, 890), (1, 9, 17, 33, 65, 108, 583)),
    "alpaca_eval": ((3, 9, 14, 24, 45, 78, 464), (1, 27, 84, 181, 316, 461, 972)),
    "instructions": ((5, 13, 18, 28, 41, 56, 307), (1, 12, 35, 75, 118, 157, 667)),
}


def load(name: str, num: int, vocabulary: int, *, seed: int, folder: Path) -> tuple[list[Tree], str]:
    """Choose `num` rows at random; give them as trees, and whether they are texts or lengths only.

    hh and alpaca_eval are pairs (a prompt, the chosen and the rejected answer); instructions are one sequence each,
    with the answer to be learnt. Rows of more than MAX_LENGTH tokens in a sequence are left out.
    """
    rng = np.random.default_rng(seed)
    found = list(_texts(name, vocabulary, folder)) if folder.is_dir() else _drawn(name, num, vocabulary, rng)
    kept = [row for row in found if len(row[0]) + max(map(len, row[1:])) <= MAX_LENGTH]
    assert len(kept) >= num, f"{name} has {len(kept)} rows of at most {MAX_LENGTH} tokens, {num} are asked for"
    chosen = [kept[i] for i in rng.permutation(len(kept))[:num]]
    return [_tree(*row) for row in chosen], "texts" if folder.is_dir() else "drawn lengths"


def save(trees: Sequence[Tree], path: Path) -> None:
    """Write rows for another process, which then holds nothing else of the data."""
    path.write_text(json.dumps([[tree.prompt, tree.answers, tree.supervised] for tree in trees]))


def saved(path: Path) -> list[Tree]:
    """Read what `save` wrote."""
    rows = json.loads(path.read_text())
    return [Tree(tuple(prompt), tuple(map(tuple, answers)), tuple(marks)) for prompt, answers, marks in rows]


def real_tokens(trees: list[Tree]) -> int:
    """Count each prompt's and each answer's tokens once."""
    return sum(tree.num_tokens for tree in trees)


def _tree(prompt: list[int], *answers: list[int]) -> Tree:
    if len(answers) == 1:
        marks = (False,) * len(prompt) + (True,) * len(answers[0])
        return Tree(tuple(prompt + answers[0]), supervised=marks)
    return Tree(tuple(prompt), tuple(map(tuple, answers)))


def _tokens(text: str, vocabulary: int) -> list[int]:
    return [FIRST + zlib.crc32(piece.encode()) % (vocabulary - FIRST) for piece in PIECE.findall(text)]


def _texts(name: str, vocabulary: int, folder: Path) -> Iterator[list[list[int]]]:
    """Yield tokens of a prompt and its answers; every answer ends with the stop token."""
    read = {"hh": _hh, "alpaca_eval": _alpaca_eval, "instructions": _instructions}[name]
    for prompt, *answers in read(folder):
        if all(answer.strip() for answer in answers):
            yield [_tokens(prompt, vocabulary), *([*_tokens(answer, vocabulary), STOP] for answer in answers)]


def _hh(folder: Path) -> Iterator[tuple[str, ...]]:
    """Pairs of multi-turn conversations that differ in the last answer only."""
    for row in pq.read_table(folder / "hh_harmless_test.parquet").to_pylist():
        if row["same_prompt"] and row["chosen"] != row["rejected"]:
            yield row["prompt"], row["chosen"], row["rejected"]


def _alpaca_eval(folder: Path) -> Iterator[tuple[str, ...]]:
    """Of each prompt two models' answers, the one the judge preferred first."""
    prompts = pq.read_table(folder / "alpaca_eval_prompts.parquet").column("instruction").to_pylist()
    answers: dict[int, list[tuple[float, str]]] = {}
    for row in pq.read_table(folder / "alpaca_eval2_responses.parquet").to_pylist():
        answers.setdefault(int(row["prompt_id"]), []).append((row["gpt4_preference"] or 0.0, row["response"]))
    rng = np.random.default_rng(0)
    for i, scored in sorted(answers.items()):
        pair = [scored[k] for k in rng.permutation(len(scored))[:2]]
        (_, chosen), (_, rejected) = sorted(pair, reverse=True)
        yield prompts[i], chosen, rejected


def _instructions(folder: Path) -> Iterator[tuple[str, ...]]:
    for name in ("alpaca_5k", "gpteacher"):
        for row in pq.read_table(folder / f"{name}.parquet").to_pylist():
            yield f"{row['instruction']}\n{row['input']}\n", row["output"]


def _drawn(name: str, num: int, vocabulary: int, rng: np.random.Generator) -> list[list[list[int]]]:
    """Draw rows of random ids with lengths from QUANTILES; prompt and answers are drawn apart."""
    prompts, answers = (np.asarray(q) for q in QUANTILES[name])
    num_answers = 1 if name == "instructions" else 2
    rows = []
    for _ in range(2 * num):  # some are too long
        sizes = [np.interp(rng.uniform(0, 100), LEVELS, q) for q in (prompts, *[answers] * num_answers)]
        prompt, *others = (rng.integers(FIRST, vocabulary, int(size)).tolist() for size in sizes)
        rows.append([prompt, *([*tokens, STOP] for tokens in others)])
    return rows
