"""Membership attacks: areas by brute force, entropies by loops, attackers that must and must not succeed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.core.metrics import wilson_interval
from postgrad.errors import DataError
from postgrad.forgetting.membership import (
    Sides,
    attack_features,
    auc,
    auc_difference,
    auc_interval,
    entropy,
    hits_at,
    lira_scores,
    loss_confidence,
    loss_sides,
    modified_entropy,
    published_modified_entropy,
    roc,
    sample_losses,
    separation,
    svc_attacks,
)

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sides(positive: list[int], negative: list[int]) -> Sides:
    return Sides(torch.tensor(positive, dtype=torch.float32), torch.tensor(negative, dtype=torch.float32))


def kernel(both: Sides) -> torch.Tensor:
    """Compare every pair: 1 in order, 0.5 equal."""
    gap = both.positive.double()[:, None] - both.negative.double()
    return (gap > 0).double() + 0.5 * (gap == 0)


@given(scores, scores)
def test_the_area_counts_pairs_and_turns_with_the_sides(positive: list[int], negative: list[int]) -> None:
    both = sides(positive, negative)
    assert auc(both) == pytest.approx(float(kernel(both).mean()), abs=1e-12)
    assert auc(both) + auc(Sides(both.negative, both.positive)) == pytest.approx(1.0)


@given(scores, scores)
def test_the_curve_encloses_the_area(positive: list[int], negative: list[int]) -> None:
    both = sides(positive, negative)
    curve = roc(both)
    assert (curve.alarms[-1], curve.hits[-1]) == (1.0, 1.0)
    area = torch.trapezoid(torch.tensor(curve.hits), torch.tensor(curve.alarms))
    assert float(area) == pytest.approx(auc(both), abs=1e-6)


def test_a_long_curve_is_thinned() -> None:
    assert len(roc(Sides(noise(500), noise(500, seed=1)), points=50).hits) == 51


def test_delongs_interval_by_brute_force() -> None:
    both = Sides(noise(30) + 0.7, noise(20, seed=1))
    table = kernel(both)
    spread = float(table.mean(1).var() / 30 + table.mean(0).var() / 20)
    found = auc_interval(both)
    half = 1.959963984540054 * math.sqrt(spread)
    assert found == pytest.approx((float(table.mean()), float(table.mean()) - half, float(table.mean()) + half))


def test_the_areas_interval_covers() -> None:
    """Normals one deviation apart: the area is Phi(1 / sqrt 2) = 0.7602."""
    inside = 0
    for seed in range(300):
        found = auc_interval(Sides(noise(40, seed=seed) + 1, noise(50, seed=1000 + seed)))
        inside += found.low <= 0.76025 <= found.high
    assert 0.91 <= inside / 300 <= 0.98


def test_all_told_apart_is_not_certainty() -> None:
    share = wilson_interval(10, 10)
    assert auc_interval(Sides(torch.arange(10.0) + 50, torch.arange(20.0))) == pytest.approx(share)
    assert auc_interval(sides([1], [0, 0])).low == pytest.approx(wilson_interval(1, 1).low)
    equal = auc_interval(sides([1, 1], [1, 1, 1]))
    assert equal.value == 0.5 and equal.low < 0.2 and equal.high > 0.8


def test_areas_of_the_same_samples_are_compared_in_pairs() -> None:
    shared = noise(60), noise(60, seed=1)
    both = Sides(shared[0] + 0.1 * noise(60, seed=2) + 0.8, shared[1])
    gold = Sides(shared[0] + 0.1 * noise(60, seed=3) + 0.5, shared[1])
    found = auc_difference(both, gold)
    gap = kernel(both) - kernel(gold)
    half = 1.959963984540054 * math.sqrt(float(gap.mean(1).var() / 60 + gap.mean(0).var() / 60))
    assert found == pytest.approx((float(gap.mean()), float(gap.mean()) - half, float(gap.mean()) + half))
    assert found.low > 0  # the two intervals by themselves overlap
    assert auc_interval(both).low < auc_interval(gold).high


def test_equal_areas_keep_a_width_and_other_samples_are_refused() -> None:
    both = Sides(torch.arange(10.0) + 50, torch.arange(20.0))
    found = auc_difference(both, both)
    assert found.value == 0 and found.low == pytest.approx(-found.high) and found.high > 0.2
    with pytest.raises(DataError, match=r"groups of \(10, 20\) and \(9, 20\)"):
        auc_difference(both, Sides(both.positive[:9], both.negative))


def test_without_gold_there_is_no_difference() -> None:
    both = sides([1, 2, 3], [0, 1, 2])
    alone, beside = separation(both, None), separation(both, both)
    assert (alone.gold, alone.difference) == (None, None)
    assert beside.gold == alone.auc and beside.difference is not None


@pytest.mark.parametrize("bad", [torch.tensor([]), torch.tensor([math.nan])])
def test_an_area_needs_numbers_on_both_sides(bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match="Area: expected"):
        auc_interval(Sides(torch.zeros(3), bad))


def test_hits_at_few_alarms_by_hand() -> None:
    """Of ten others one may be flagged: the threshold is the second highest, 8."""
    both = Sides(torch.tensor([12.0, 8.5, 8.0, 3.0]), torch.arange(10.0))
    assert hits_at(both, 0.1) == 0.5
    assert hits_at(both, 0.0) == 0.25
    assert hits_at(both, 1.0) == 1.0


def test_members_have_the_lower_loss() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 1.0]])
    losses = sample_losses(logits, torch.tensor([0, 1, 0, 0]))
    assert float(losses[2]) == pytest.approx(math.log(2))
    assert auc(loss_sides(losses[:2], losses[2:])) == 1.0


def looped_entropies(probs: list[float], label: int) -> tuple[float, float]:
    plain = -sum(p * math.log(p) for p in probs)
    own = -(1 - probs[label]) * math.log(probs[label])
    return plain, own - sum(p * math.log(1 - p) for i, p in enumerate(probs) if i != label)


def test_entropies_by_their_formulas() -> None:
    logits, labels = noise(20, 5) * 3, torch.arange(20) % 5
    rows = zip(logits.double().softmax(1).tolist(), labels.tolist(), strict=True)
    wanted = torch.tensor([looped_entropies(*row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([entropy(logits), modified_entropy(logits, labels)], 1), wanted)


def test_extreme_answers_have_finite_entropies() -> None:
    """Sure and right is 0; sure and wrong grows with the gap, on both terms: -(1 - p) log p - p' log(1 - p')."""
    logits = torch.tensor([[500.0, 0.0, 0.0], [500.0, 0.0, -500.0]])
    assert modified_entropy(logits, torch.tensor([0, 0])).tolist() == [0, 0]
    wrong = modified_entropy(logits, torch.tensor([1, 2]))
    assert wrong.tolist() == pytest.approx([500 + 500 - math.log(2), 1000 + 500])
    assert entropy(logits).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_the_published_entropy_row_by_row() -> None:
    """Columns 0 and 2 occur as labels: there every row has -(1 - p) log p, elsewhere -p log p."""
    logits, labels = noise(4, 4), torch.tensor([0, 2, 2, 0])
    wanted = []
    for row in logits.double().softmax(1).tolist():
        wanted.append(-sum((1 - p if i in (0, 2) else p) * math.log(p) for i, p in enumerate(row)))
    assert published_modified_entropy(logits, labels).tolist() == pytest.approx(wanted)
    alone = published_modified_entropy(logits[:1], labels[:1])
    assert float(alone) != pytest.approx(wanted[0])  # the other samples' labels matter
    assert float(published_modified_entropy(torch.tensor([[0.0, -900.0]]), torch.tensor([0]))) == 0


def test_what_attacks_look_at() -> None:
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    found = attack_features(logits, torch.tensor([0, 1]))
    assert list(found) == ["correctness", "confidence", "entropy", "modified entropy", "probabilities"]
    assert found["correctness"][:, 0].tolist() == [1, 0]
    assert found["confidence"][:, 0].tolist() == pytest.approx([0.75, 0.5])
    assert found["probabilities"].shape == (2, 2)
    assert "published modified entropy" in attack_features(logits, torch.tensor([0, 1]), published=True)


def test_an_attacker_tells_what_can_be_told() -> None:
    pytest.importorskip("sklearn")
    members, others = {"x": noise(60, 1) + 4}, {"x": noise(50, 1, seed=1) - 4}
    found = svc_attacks(members, others, {"x": torch.tensor([[4.0], [3.5], [-4.0], [4.2]])})["x"]
    assert found.members.value == 75 and found.power.value == 100
    assert found.members == pytest.approx([100 * end for end in wilson_interval(3, 4)])


def test_an_attacker_without_evidence_has_no_power() -> None:
    pytest.importorskip("sklearn")
    members, others = {"x": noise(400, 2, seed=3)}, {"x": noise(400, 2, seed=4)}
    found = svc_attacks(members, others, {"x": noise(50, 2, seed=5)}, limit=200)["x"]
    assert found.power.low < 50 < found.power.high
    with pytest.raises(DataError, match="4 or more samples of each side, found 3"):
        svc_attacks({"x": noise(3, 2)}, others, {"x": noise(5, 2)})


def test_loss_confidences_by_hand() -> None:
    """p = 3/4: log 3. p = 1 stays finite."""
    losses = torch.tensor([-math.log(0.75), math.log(2)], dtype=torch.float64)
    assert loss_confidence(losses).tolist() == pytest.approx([math.log(3), 0])
    assert float(loss_confidence(torch.tensor(0.0))) == pytest.approx(math.log(1e15), rel=1e-3)


def test_likelihood_ratios_by_hand() -> None:
    """Shadow confidences 0 and log 9 have mean log 3 and deviation log 9 / sqrt 2."""
    shadow = torch.tensor([[math.log(2), math.log(2)], [-math.log(0.9), math.log(2)]], dtype=torch.float64)
    losses = torch.tensor([-math.log(0.9), math.log(2)], dtype=torch.float64)
    each = lira_scores(losses, shadow, pooled=False)
    assert float(each[0]) == pytest.approx(math.log(3) / (math.log(9) / math.sqrt(2)))
    pooled = lira_scores(losses, shadow)
    assert float(pooled[0]) == pytest.approx(math.log(3) / (math.log(9) / 2))
    assert float(pooled[1]) == pytest.approx(0)
    with pytest.raises(DataError, match="2 or more shadow models, found 1"):
        lira_scores(losses, shadow[:1])


def test_likelihood_ratios_tell_members_that_losses_do_not() -> None:
    """Hard and easy samples hide membership from the loss, not from models that never saw them."""
    hard = 3 * noise(400)
    shadow = torch.nn.functional.softplus(-(hard + 0.5 * noise(8, 400, seed=1)))
    seen = torch.arange(400) < 200
    losses = torch.nn.functional.softplus(-(hard + 0.5 * noise(400, seed=2) + 1.0 * seen))
    by_loss = auc(loss_sides(losses[seen], losses[~seen]))
    ratios = lira_scores(losses, shadow)
    assert auc(Sides(ratios[seen], ratios[~seen])) > max(0.85, by_loss + 0.2)
