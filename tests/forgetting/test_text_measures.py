"""What a model makes of rows: equal to one row at a time, and by hand."""

from pathlib import Path

import pytest
import torch
from texts import PACKING, job, trees

from postgrad.core.config import ModelConfig
from postgrad.core.models import load_lm, target_logprobs
from postgrad.core.rows import Tree, pack
from postgrad.forgetting import text_measures
from postgrad.forgetting.text_measures import Known, Measured, last_answer, measure, offer, say, some


@pytest.fixture
def model(tmp_path: Path):
    found, _ = load_lm(ModelConfig(tiny_width=16, tiny_layers=1), job(tmp_path))
    return found.eval()


def test_measured_rows_equal_rows_alone(tmp_path: Path, model) -> None:
    rows = trees(9)
    found = measure(model, rows, PACKING, job(tmp_path))
    for i in range(len(rows)):
        alone = pack(rows, [i], row_length=0, layout="flat", pad_id=256)
        with torch.no_grad():
            logits = model(alone.tokens).logits[0]
            expected = -float(target_logprobs(model, alone).sum())
        assert found.nll[i].item() == pytest.approx(expected, abs=1e-4)
        best = logits[alone.source].argmax(1)
        assert found.known[i].item() == pytest.approx(float((best == alone.target).double().mean()))


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_offered_answers_equal_answers_alone(tmp_path: Path, model, layout: str) -> None:
    """Answers that share a question's tokens, in packed rows and in rows of their own."""
    asked = [Tree((5, 6, 7), ((8, 9), (10,), (11, 12, 13))), Tree((20, 21), ((22,), (23, 24)))]
    found = offer(model, asked, PACKING._replace(layout=layout, micro_tokens=8), job(tmp_path))
    for tree, losses in zip(asked, found, strict=True):
        for answer, loss in zip(tree.answers, losses, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*tree.prompt, *answer]])).logits[0].log_softmax(1)
            at = range(len(tree.prompt) - 1, len(tree.prompt) + len(answer) - 1)
            expected = -sum(float(logits[place, token]) for place, token in zip(at, answer, strict=True)) / len(answer)
            assert loss == pytest.approx(expected, abs=1e-5)


def test_answers_are_generated_from_what_comes_before_them(monkeypatch, tmp_path: Path, model) -> None:
    """In batches of any size, in the order of the rows."""
    tree = Tree((1, 2, 3, 4, 5, 6), (), (False, True, False, False, True, True))
    assert last_answer(tree) == ((1, 2, 3, 4), (5, 6))
    _, tokenizer = load_lm(ModelConfig(tiny_width=16, tiny_layers=1), job(tmp_path))
    whole = say(model, trees(5), tokenizer, job(tmp_path))
    monkeypatch.setattr(text_measures, "AT_A_TIME", 2)
    assert say(model, trees(5), tokenizer, job(tmp_path)) == whole and len(whole) == 5


def test_figures_by_hand() -> None:
    """3 nats over 2 tokens and 1 over 2; the second row is known whole; the first row's wrong answer is as likely."""
    found = Measured(torch.tensor([1.0, 2.0, 0.5, 0.5]), torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([2, 2]))
    assert found.means.tolist() == [1.5, 0.5] and found.loss == 1.0
    assert found.greedy == 75 and found.recited == 50 and found.num_recited == 1
    known = Known(found, torch.tensor([0.0, 1.0]), ((1.0, 1.0), (0.0, 0.6931471805599453)))
    figures = known.figures(forgotten=True)
    assert figures["truth_ratio"] == pytest.approx(0.75) and figures["rouge_l"] == 0.5
    assert figures["probability"] == pytest.approx((0.22313 + 0.60653) / 2, abs=1e-5)
    assert known.figures(options=True) == pytest.approx(
        {"probability": (1 / 2 + 2 / 3) / 2, "rouge_l": 0.5, "truth_ratio": 0.25}
    )
    assert "truth_ratio" not in Known(found, torch.zeros(2), ()).figures()


def test_some_are_evenly_spaced() -> None:
    assert [tree.prompt for tree in some([Tree((i,)) for i in range(9)], 3)] == [(0,), (4,), (8,)]
    assert len(some([], 3)) == 0 and len(some(trees(2), 3)) == 2
