"""Attacks on features: brute force, scikit-learn and hand values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.core.metrics import wilson_interval
from postgrad.errors import DataError
from postgrad.forgetting import leakage
from postgrad.forgetting.leakage import (
    Pass,
    activation_distance,
    excess,
    feature_cosine,
    fit_probe,
    js_divergence,
    knn_found,
    knn_predictions,
    linear_cka,
    nearest,
    probe_found,
    probe_predictions,
    recovery,
    rivals,
    stands_out,
    swap_found,
    zero_retrain_forgetting,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clusters(num: int, width: int = 6, num_classes: int = 4, seed: int = 0, spread: float = 0.7) -> Pass:
    """Draw samples around fixed centres; the logits are cosines to the centres."""
    centres = noise(num_classes, width, seed=99)
    labels = torch.arange(num) % num_classes
    features = centres[labels] + spread * noise(num, width, seed=seed)
    return Pass(features, features @ centres.T, labels)


def test_neighbours_equal_brute_force_whatever_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = noise(17, 5), noise(40, 5, seed=1)
    similar = torch.nn.functional.cosine_similarity(queries[:, None].double(), bank.double(), dim=2)
    wanted = similar.argsort(dim=1, descending=True)[:, :7]
    assert nearest(queries, bank, 7).equal(wanted)
    monkeypatch.setattr(leakage, "_TILE_ELEMENTS", 100)
    assert nearest(queries, bank, 7).equal(wanted)


def test_equally_near_neighbours_come_by_place() -> None:
    bank = noise(6, 4).repeat(5, 1) * torch.arange(1, 31)[:, None]  # cosine does not see lengths
    for at, near in enumerate(nearest(bank[:6], bank, 5).tolist()):
        assert near == [at, at + 6, at + 12, at + 18, at + 24]


def test_only_allowed_neighbours_are_taken() -> None:
    bank, allowed = noise(10, 3), torch.arange(10)[None] % 2 == 1
    near = nearest(noise(1, 3, seed=1), bank, 5, allowed)
    assert sorted(near[0].tolist()) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("k", [0, 11])
def test_a_bank_needs_k_samples(k: int) -> None:
    with pytest.raises(DataError, match=f"found k = {k}"):
        nearest(noise(2, 3), noise(10, 3), k)


def test_no_queries_have_no_neighbours() -> None:
    assert nearest(noise(0, 3), noise(10, 3), 2).shape == (0, 2)


@given(st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_a_vote_goes_to_the_most_frequent_then_the_nearest_class(labels: list[int]) -> None:
    """The bank lies at growing angles from the query, so that its order is that of nearness."""
    angles = torch.arange(5) * 0.2
    bank = torch.stack([angles.cos(), angles.sin()], 1)
    most = max(labels.count(label) for label in labels)
    wanted = next(label for label in labels if labels.count(label) == most)
    assert knn_predictions(torch.tensor([[1.0, 0.0]]), bank, torch.tensor(labels), k=5).tolist() == [wanted]


def test_neighbours_vote_as_in_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    from sklearn.neighbors import KNeighborsClassifier

    bank, test = clusters(200), clusters(80, seed=1)
    for k in (1, 5):
        peer = KNeighborsClassifier(k, metric="cosine").fit(bank.features.numpy(), bank.labels.numpy())
        votes = peer.predict_proba(test.features.numpy())
        clear = torch.from_numpy((votes == votes.max(1, keepdims=True)).sum(1) == 1)
        ours = knn_predictions(test.features, bank.features, bank.labels, k=k)
        assert clear.sum() > 60
        assert ours[clear].equal(torch.from_numpy(peer.predict(test.features.numpy()))[clear])


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_the_probe_is_scikit_learns_logistic_regression(penalty: float) -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression

    bank = clusters(150)
    probe = fit_probe(bank.features, bank.labels, penalty=penalty, tolerance=1e-9)
    design = ((bank.features.double() - probe.mean) / probe.scale).numpy()
    peer = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000).fit(design, bank.labels.numpy())
    wanted = torch.from_numpy(peer.predict_log_proba(design))
    torch.testing.assert_close(probe.logits(bank.features).log_softmax(1), wanted, atol=1e-5, rtol=1e-5)


def test_the_probe_ends_where_its_gradient_is_zero() -> None:
    bank = clusters(90)
    probe = fit_probe(bank.features, bank.labels, penalty=2.0, tolerance=1e-7)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    design = (bank.features.double() - probe.mean) / probe.scale
    losses = torch.nn.functional.cross_entropy(design @ weight.T + bias, bank.labels, reduction="sum")
    (losses + weight.square().sum()).backward()
    assert weight.grad is not None and bias.grad is not None
    assert max(float(weight.grad.abs().max()), float(bias.grad.abs().max())) < 90 * 1e-7


def test_a_probe_knows_only_the_classes_of_its_bank_and_takes_constant_features() -> None:
    bank = clusters(120)
    some = bank.of([1, 3])
    features = torch.cat([some.features, torch.ones(len(some.labels), 1)], 1)
    probe = fit_probe(features, some.labels)
    assert probe.classes.tolist() == [1, 3]
    assert set(probe_predictions(probe, features).tolist()) == {1, 3}
    assert torch.isfinite(probe.weight).all()


def test_the_probe_works_without_autograd_and_twice_the_same() -> None:
    bank = clusters(60)
    with torch.inference_mode():
        first = fit_probe(bank.features * 1.0, bank.labels)
    assert first.weight.equal(fit_probe(bank.features, bank.labels).weight)


def test_a_probe_needs_a_penalty() -> None:
    bank = clusters(20)
    with pytest.raises(DataError, match="penalty above 0"):
        fit_probe(bank.features, bank.labels, penalty=0.0)


def test_alone_strikes_the_other_forgotten_classes() -> None:
    labels = torch.tensor([1, 3, 1])
    assert rivals(labels, [1, 3], 4, alone=True).int().tolist() == [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0]]
    assert rivals(labels, [1, 3], 4, alone=False).all()


def test_a_class_hidden_behind_another_forgotten_one_is_found_alone() -> None:
    """Class 2's queries lie on class 3's samples and near their own: only among all classes do they hide."""
    bank = Pass(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.3, 1.0]]), torch.zeros(4, 4), torch.arange(4))
    test = Pass(torch.tensor([[0.29, 1.0], [1.0, 0.1]]), torch.zeros(2, 4), torch.tensor([2, 0]))
    assert knn_found(bank, test, [2, 3], k=1).tolist() == [False]
    assert knn_found(bank, test, [2, 3], k=1, alone=True).tolist() == [True]


def test_separate_clusters_are_found_and_mixed_ones_are_not() -> None:
    bank, test = clusters(400, spread=0.2), clusters(200, seed=1, spread=0.2)
    probe = fit_probe(bank.features, bank.labels)
    for alone in (False, True):
        assert knn_found(bank, test, [2, 3], alone=alone).all()
        assert probe_found(probe, test, [2, 3], alone=alone).all()
    lost = [Pass(noise(len(part.labels), 6, seed=i), part.logits, part.labels) for i, part in enumerate((bank, test))]
    assert float(knn_found(lost[0], lost[1], [2, 3]).double().mean()) < 0.45
    assert float(probe_found(fit_probe(lost[0].features, lost[0].labels), lost[1], [2, 3]).double().mean()) < 0.45


def test_refitted_rows_bring_back_what_the_head_alone_forgot() -> None:
    bank, test = clusters(200, spread=0.2), clusters(100, seed=1, spread=0.2)
    spoilt = [Pass(p.features, p.logits.index_fill(1, torch.tensor([2, 3]), -50.0), p.labels) for p in (bank, test)]
    assert not (spoilt[1].of([2, 3]).logits.argmax(1) == test.of([2, 3]).labels).any()
    assert swap_found(spoilt[0], spoilt[1], [3, 2]).all()


def test_refitting_keeps_the_other_rows() -> None:
    """Row 0 says 1000 for everybody, and no refitted row with a penalty reaches that."""
    bank, test = clusters(60), clusters(40, seed=1)
    bank, test = (Pass(p.features, p.logits.index_fill(1, torch.tensor([0]), 1e3), p.labels) for p in (bank, test))
    assert not swap_found(bank, test, [3], penalty=1e3).any()


def test_the_excess_by_hand() -> None:
    """10 samples, 3 found only here, 1 only by gold: (3 - 1) / 10; Bonett and Price: 4/12 - 2/12 +- z 0.1967."""
    found = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    gold = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    half = 1.959963984540054 * math.sqrt((6 / 12 - (2 / 12) ** 2) / 12)
    value = excess(found, gold)
    assert value == pytest.approx((20.0, 100 * (2 / 12 - half), 100 * (2 / 12 + half)))
    back = excess(gold, found)
    assert back == pytest.approx((-20.0, -100 * (2 / 12 + half), -100 * (2 / 12 - half)))


def test_no_difference_is_not_certainty() -> None:
    value = excess(torch.ones(72, dtype=torch.bool), torch.ones(72, dtype=torch.bool))
    assert value is not None and value.value == 0 and value.low < -2 and value.high > 2
    whole = excess(torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool))
    assert whole is not None and whole.high == whole.value == 100 and whole.low > 85


def test_the_interval_of_the_excess_covers() -> None:
    """Found with chance .7 and gold with .6, half of it together: 95 % of the intervals hold the 10 points."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(400, 3, 60, generator=generator)
    shared = draws[:, 2] < 0.5
    founds = torch.where(shared, draws[:, 0], draws[:, 1]) < 0.7
    golds = draws[:, 0] < 0.6
    inside = 0
    for found, gold in zip(founds, golds, strict=True):
        value = excess(found, gold)
        assert value is not None
        inside += value.low <= 10 <= value.high
    assert 0.92 <= inside / 400 <= 0.99


def test_without_gold_there_is_no_excess() -> None:
    found = torch.tensor([True, False, True, True])
    assert excess(found, None) is None
    alone = recovery(found, None)
    assert (alone.gold, alone.excess) == (None, None)
    assert alone.share == pytest.approx([100 * end for end in wilson_interval(3, 4)])
    beside = recovery(found, ~found)
    assert beside.gold is not None and beside.gold.value == 25 and beside.excess is not None


def test_cka_sees_neither_rotation_nor_scale() -> None:
    features = noise(50, 4).double()
    turn = torch.linalg.qr(noise(4, 4, seed=1).double()).Q
    assert linear_cka(features, 3 * features @ turn + 2) == pytest.approx(1.0)
    assert linear_cka(features, noise(50, 6, seed=2)) < 0.4
    assert math.isnan(linear_cka(features, torch.ones(50, 2)))


def test_cka_equals_the_kernels_alignment() -> None:
    a, b = noise(20, 4).double(), noise(20, 7, seed=1).double()
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    left, right = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    wanted = float((left * right).sum() / (left.norm() * right.norm()))
    assert linear_cka(a, b) == pytest.approx(wanted)


def test_cosines_by_hand() -> None:
    value = feature_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    assert value.value == pytest.approx(0.5)


def test_divergences_by_hand() -> None:
    """(1, 0) against (0, 1): ln 2 and sqrt 2. (1/2, 1/2) against (1, 0): 3/4 ln(4/3) + ... = 0.2157616."""
    sure, other, open_ = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-900.0, 0.0]]), torch.zeros(1, 2)
    assert float(js_divergence(sure, other)) == pytest.approx(math.log(2))
    assert float(js_divergence(sure, sure)) == 0
    half = 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) + 0.5 * math.log(1 / 0.75)
    assert float(js_divergence(open_, sure)) == pytest.approx(half)
    assert float(js_divergence(sure, open_)) == pytest.approx(half)
    assert float(activation_distance(sure, other)) == pytest.approx(math.sqrt(2))
    assert float(activation_distance(open_, sure)) == pytest.approx(math.sqrt(0.5))
    assert zero_retrain_forgetting(sure, other) == pytest.approx(1 - math.log(2))
    assert zero_retrain_forgetting(open_, open_) == 1


def test_unsure_answers_stand_out() -> None:
    test = Pass(noise(4, 2), torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.0, 8.0], [0.3, 0.2]]), torch.tensor([0, 1, 0, 1]))
    for by in ("max logit", "entropy"):
        sides = stands_out(test, [1], [0], by)
        assert sides.positive.min() > sides.negative.max()
