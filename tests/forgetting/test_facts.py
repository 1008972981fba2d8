"""Invented facts: the same for a seed, no name twice, read as any other data."""

from pathlib import Path

from postgrad.core.config import DataConfig
from postgrad.core.data import load_examples
from postgrad.forgetting.facts import PARTS, QUESTIONS, FactSizes, facts, write_facts

SIZES = FactSizes(forget=2, retain=5, held_out=3)


def test_a_seed_gives_the_same_people_and_another_seed_others() -> None:
    assert facts(5, 1) == facts(5, 1) == facts(9, 1)[:5]
    assert facts(5, 1) != facts(5, 2)


def test_no_question_is_asked_twice(tmp_path: Path) -> None:
    """The three files share no person; each person is asked about in every way."""
    paths = write_facts(tmp_path, 0, SIZES)
    texts = [load_examples(DataConfig(path=str(paths[name]))).items for name in PARTS]
    assert [len(part) for part in texts] == [len(QUESTIONS) * num for num in (2, 5, 3)]
    asked = [example.messages[0]["content"] for part in texts for example in part]
    assert len(set(asked)) == len(asked) == len(QUESTIONS) * 10
    assert all(example.messages[1]["content"].isalpha() for part in texts for example in part)


def test_the_same_bytes_again(tmp_path: Path) -> None:
    first, second = (write_facts(tmp_path / name, 4, SIZES) for name in "ab")
    assert {name: path.read_bytes() for name, path in first.items()} == {
        name: path.read_bytes() for name, path in second.items()
    }
