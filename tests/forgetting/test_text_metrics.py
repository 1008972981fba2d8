"""TOFU's figures, by hand and against libraries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.forgetting.text_metrics import (
    chosen_probability,
    even_truth,
    extraction_strength,
    forget_quality,
    model_utility,
    probability,
    rouge_l_recall,
    told_truth,
    truth_ratio,
    words,
)

HALF, QUARTER, EIGHTH = (math.log(number) for number in (2, 4, 8))


def test_probability() -> None:
    """Losses a token of ln 2 and ln 4; against two wrong answers of 1/8 each, 1/2 is 2/3 of what is offered."""
    losses = torch.tensor([HALF, QUARTER], dtype=torch.float64)
    torch.testing.assert_close(probability(losses), torch.tensor([0.5, 0.25], dtype=torch.float64))
    share = chosen_probability(losses, [[EIGHTH, EIGHTH], [QUARTER]])
    torch.testing.assert_close(share, torch.tensor([2 / 3, 0.5], dtype=torch.float64))


def test_truth_ratio() -> None:
    """Wrong answers of 1/2 and 1/8 have the geometric mean 1/4: half of a right one's 1/2, twice of a right 1/8."""
    right = torch.tensor([HALF, EIGHTH], dtype=torch.float64)
    ratios = truth_ratio(right, [[HALF, EIGHTH], [EIGHTH, HALF]])
    torch.testing.assert_close(ratios, torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert even_truth(ratios) == pytest.approx(0.5) and told_truth(ratios) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("said", "answer", "share"),
    [
        ("The cat sat.", "the cat sat", 1.0),
        ("a dog", "the cat sat", 0.0),
        ("sat the cat", "the cat sat", 2 / 3),
        ("the cat, the cat and the cat sat", "the cat sat", 1.0),
        ("", "the cat", 0.0),
        ("", "...", 1.0),
        ("so", "...", 0.0),
        ("Ærø is an island", "ærø", 1.0),
    ],
)
def test_rouge_l(said: str, answer: str, share: float) -> None:
    assert rouge_l_recall(said, answer) == pytest.approx(share)


def brute(said: tuple[str, ...], answer: tuple[str, ...]) -> int:
    """Find the longest common subsequence by trying."""
    if not said or not answer:
        return 0
    if said[0] == answer[0]:
        return 1 + brute(said[1:], answer[1:])
    return max(brute(said[1:], answer), brute(said, answer[1:]))


@given(st.text("ab ", max_size=9), st.text("ab ", min_size=1, max_size=9))
def test_rouge_l_is_the_longest_common_subsequence(said: str, answer: str) -> None:
    ours, theirs = tuple(words(said)), tuple(words(answer))
    if theirs:
        assert rouge_l_recall(said, answer) == pytest.approx(brute(ours, theirs) / len(theirs))


def test_extraction_strength() -> None:
    """Right from the third of four on, from the start, and never at the end."""
    right = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    found = extraction_strength(right, torch.tensor([4, 2, 2]))
    assert found.tolist() == [0.5, 1.0, 0.0]


def test_model_utility() -> None:
    assert model_utility([0.5, 1.0, 1.0]) == pytest.approx(0.75)
    assert model_utility([0.5, 0.0]) == 0 == model_utility([])


def test_forget_quality() -> None:
    """The same ratios give 1; ratios that do not overlap give the smallest p-value there is: 2 / C(20, 10)."""
    ratios = torch.rand(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert forget_quality(ratios, ratios) == 1
    assert forget_quality(ratios, ratios + 2) == pytest.approx(2 / math.comb(20, 10))
