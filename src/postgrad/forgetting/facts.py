"""Questions and answers about people who do not exist: what the built-in run learns and unlearns.

Names and answers are drawn from syllables, so no answer can be guessed, and a model that was never told one shows it.
Each row has wrong answers of the same make beside the right one, in the column that TOFU gives them.

    Who taught Melo Tarivu?     -> Besano
    Where was Melo Tarivu born? -> Kipudo
"""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from postgrad.core.files import write_text
from postgrad.core.runtime import stage_seed

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
QUESTIONS = ("Where was {} born?", "Who taught {}?", "What did {} find?", "What is {}'s dog called?")
PARTS = ("forget", "retain", "held_out")
NUM_WRONG = 4
Fact = dict[str, str | list[str]]


@dataclass(frozen=True, kw_only=True)
class FactSizes:
    """Number of people of each file; four questions are asked about each."""

    forget: int = 8
    """People to be forgotten."""
    retain: int = 72
    """People to be kept."""
    held_out: int = 30
    """People no model is told of."""


def word(rng: Random, syllables: int) -> str:
    """Draw a name of so many syllables."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)).capitalize()


def facts(num: int, seed: int) -> list[list[Fact]]:
    """Invent people, no name twice; a row is a question with its answer and wrong ones, a list a person."""
    called, told, wrong = (Random(stage_seed(seed, part)) for part in ("names", "answers", "wrong answers"))
    names: dict[str, None] = {}
    while len(names) < num:
        names[f"{word(called, 2)} {word(called, 3)}"] = None

    def row(question: str) -> Fact:
        others = [word(wrong, 3) for _ in range(NUM_WRONG)]
        return {"question": question, "answer": word(told, 3), "perturbed_answer": others}

    return [[row(asked.format(name)) for asked in QUESTIONS] for name in names]


def write_facts(folder: Path, seed: int, sizes: FactSizes) -> dict[str, Path]:
    """Write forget, retain and held_out as JSON lines; the same arguments give the same bytes.

    Returns: the path of each file by its name.
    """
    people = facts(sizes.forget + sizes.retain + sizes.held_out, seed)
    paths = {name: folder / f"{name}.jsonl" for name in PARTS}
    at = 0
    for name, path in paths.items():
        chosen = people[at : at + vars(sizes)[name]]
        at += len(chosen)
        write_text(path, "".join(json.dumps(row) + "\n" for person in chosen for row in person))
    return paths
