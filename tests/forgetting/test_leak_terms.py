"""The leak terms of a request: values by hand, neighbours by brute force, and nothing that is not finite."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from postgrad.core.vision_models import Seen
from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.batches import Pair
from postgrad.forgetting.leak_terms import NEIGHBOURS, LeakConfig, LeakTerms, check_leak, leak_terms
from postgrad.forgetting.losses import Batch

OFF = LeakConfig(keep=0.0, proxy=0.0, scatter=0.0, knn=0.0)
EVERY = LeakConfig(keep=1.0, proxy=1.0, scatter=1.0, knn=1.0, probe=1.0, compress=1.0)
NAMES = ("proxy", "scatter", "knn", "probe", "compress")
# Two forgotten images of class 2; retained ones of classes 0 and 1, which the model is sure of.
FORGET = Seen(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[math.log(3), 0.0, 9.0], [0.0, math.log(3), 9.0]]))
RETAIN = Seen(torch.tensor([[0.0, 2.0], [0.0, -2.0]]), torch.tensor([[5.0, 0.0, -9.0], [0.0, 5.0, -9.0]]))
LABELS = torch.tensor([2, 2])
OTHERS = torch.tensor([0, 1])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def terms(config: LeakConfig = EVERY) -> LeakTerms:
    return leak_terms(config, (FORGET, RETAIN), (LABELS, OTHERS), (FORGET, RETAIN))


def pair(*index: int) -> Pair:
    """These forgotten images beside both retained ones."""
    return Pair(torch.tensor([0, 1]), torch.tensor(index))


def batches(features: Tensor, logits: Tensor) -> tuple[Batch, Batch]:
    """What the model makes of the second forgotten image and of the retained ones."""
    return Batch(features, logits, LABELS[:1]), Batch(RETAIN.features, RETAIN.logits, OTHERS)


def test_what_is_noted_before_the_request() -> None:
    """Without class 2 the first image is answered as class 0, the second as class 1; variances are 0 and 4."""
    found = terms()
    assert found.forgotten == (2,)
    assert found.targets.tolist() == [[0.0, 2.0], [0.0, -2.0]]
    assert found.spread.item() == 2.0
    assert found.features is FORGET.features
    assert found.teacher[0] is FORGET.logits and found.teacher[1] is RETAIN.logits
    torch.testing.assert_close(found.span.abs(), torch.tensor([[0.0, 1.0]]))  # what classes 0 and 1 differ in
    assert found.beyond.item() == pytest.approx(0.25)  # the first feature is 1, 1, 0 and 0


def test_each_term_by_hand() -> None:
    """Image 1 at (0, 0), logits 0: KL of (1/4, 3/4) from thirds; (0 + 4) / 2 / 2; no neighbour of its class.

    Retained images are answered as before but for class 2, which had next to nothing; no feature is left outside.
    """
    gone, kept = batches(torch.tensor([[0.0, 0.0]]), torch.zeros(1, 3))
    found = terms(replace(EVERY, probe=0.0)).losses(pair(1), gone, kept)
    assert found["leak_proxy"].item() == pytest.approx(0.25 * math.log(0.75) + 0.75 * math.log(2.25))
    assert found["leak_scatter"].item() == pytest.approx(1.0)
    assert found["leak_knn"].item() == 0.0
    assert found["keep"].item() == pytest.approx(4 * math.log1p(math.exp(-7) / (1 + math.exp(-2.5))), rel=1e-3)
    assert found["leak_compress"].item() == pytest.approx(0.0)
    off = Batch(kept.features + torch.tensor([[3.0, 0.0], [0.0, 0.0]]), kept.logits, kept.labels)
    moved = terms(replace(EVERY, probe=0.0)).losses(pair(1), gone, off)["leak_compress"]
    assert moved.item() == pytest.approx(8.0)  # 0, 3 and 0: a variance of 2, before it was 1/4
    assert set(found) == {"keep", "leak_proxy", "leak_scatter", "leak_knn", "leak_compress"}


def test_weights_multiply_and_zero_leaves_a_term_out() -> None:
    gone, kept = batches(noise(1, 2), noise(1, 3))
    index = pair(0)
    whole = terms().losses(index, gone, kept)
    for name in NAMES:
        alone = terms(replace(OFF, **{name: 2.5})).losses(index, gone, kept)
        assert list(alone) == [f"leak_{name}"]
        torch.testing.assert_close(alone[f"leak_{name}"], 2.5 * whole[f"leak_{name}"])
    assert terms(OFF).losses(index, gone, kept) == {}


def test_on_says_whether_any_counts() -> None:
    assert not terms(OFF).on and not terms(replace(OFF, keep=1.0)).on
    assert all(terms(replace(OFF, **{name: 0.1})).on for name in NAMES)


def test_classes_forgotten_before_are_answered_no_more() -> None:
    """Only class 1 is left to answer with: all are answered alike, and the first retained image serves both."""
    found = leak_terms(EVERY, (FORGET, RETAIN), (LABELS, OTHERS), (FORGET, RETAIN), old=(0,))
    assert found.forgotten == (0, 2)
    assert found.targets.tolist() == [[0.0, 2.0], [0.0, 2.0]]
    gone, kept = batches(noise(1, 2), torch.tensor([[-50.0, 0.0, -50.0]]))
    assert found.losses(pair(0), gone, kept)["leak_proxy"].item() == pytest.approx(0.0, abs=1e-6)


def test_a_class_must_be_left() -> None:
    with pytest.raises(DataError, match="all 3 forgotten"):
        leak_terms(EVERY, (FORGET, RETAIN), (LABELS, OTHERS), (FORGET, RETAIN), old=(0, 1))


def brute_force(features: list[list[float]], labels: list[int], num: int) -> float:
    """Ask the nearest by cosine among all others, the smallest of the most frequent labels winning."""
    right = 0
    for i in range(num):
        own = torch.tensor(features[i])
        cosines = [
            -2.0 if j == i else float(torch.cosine_similarity(own, torch.tensor(other), dim=0))
            for j, other in enumerate(features)
        ]
        near = sorted(range(len(features)), key=lambda j: -cosines[j])[:NEIGHBOURS]
        votes = Counter(labels[j] for j in near)
        most = max(votes.values())
        right += min(label for label, num in votes.items() if num == most) == labels[i]
    return 100 * right / num


@pytest.mark.parametrize("seed", range(5))
def test_what_neighbours_find_by_brute_force(seed: int) -> None:
    labels = torch.tensor([2, 3] * 6), torch.tensor([0, 1] * 15)
    features = noise(12, 4, seed=seed), noise(30, 4, seed=seed + 100)
    features[0][::2, 0] += 2.0  # a heap of each class's own
    features[0][1::2, 1] += 2.0
    forget, retain = (Seen(part, torch.zeros(len(part), 4)) for part in features)
    found = terms().found(forget, labels[0], retain, labels[1])
    assert found == pytest.approx(brute_force(torch.cat(features).tolist(), torch.cat(labels).tolist(), 12))
    assert 0 < found < 100


def test_few_images_are_enough_to_ask() -> None:
    """Two forgotten images at one place, a retained one elsewhere: each finds the other, and the smaller label wins."""
    forget = Seen(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.zeros(2, 3))
    retain = Seen(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 3))
    assert terms().found(forget, torch.tensor([0, 0]), retain, torch.tensor([1])) == 100.0
    assert terms().found(forget, torch.tensor([2, 2]), retain, torch.tensor([1])) == 0.0


@pytest.mark.parametrize("scale", (0.0, 1.0, 1e4))
@pytest.mark.parametrize("num_retain", (1, 9))
def test_all_terms_and_gradients_are_finite(scale: float, num_retain: int) -> None:
    """Dead features, huge ones, huge logits, a single retained image, a batch of one."""
    forget = Seen(noise(6, 4) * scale, noise(6, 5) * scale)
    retain = Seen(noise(num_retain, 4, seed=1) * scale, noise(num_retain, 5, seed=2) * scale)
    labels = torch.tensor([3, 4] * 3)
    others = torch.zeros(num_retain, dtype=torch.int64)
    found = leak_terms(EVERY, (forget, retain), (labels, others), (forget, retain))
    for index in (torch.tensor([5]), torch.arange(6)):
        features, logits = (part[index].clone().requires_grad_() for part in forget)
        kept, both = Batch(retain.features, retain.logits, others), Pair(torch.arange(num_retain), index)
        losses = found.losses(both, Batch(features, logits, labels[index]), kept)
        assert set(losses) == {"keep", *(f"leak_{name}" for name in NAMES)}
        assert all(math.isfinite(loss.item()) for loss in losses.values()), losses
        sum(losses.values(), start=torch.zeros(())).backward()
        for part in (features, logits):
            assert part.grad is not None and bool(part.grad.isfinite().all())
    assert 0 <= found.found(forget, labels, retain, others) <= 100


@pytest.mark.parametrize(
    "change",
    (
        {"keep": -1.0}, {"proxy": -1.0}, {"scatter": -0.1}, {"knn": -3.0}, {"probe": -1.0}, {"compress": -1.0},
        {"temperature": 0.0}, {"softness": 0.0},
    ),
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change: dict[str, float]) -> None:
    check_leak(LeakConfig())
    (name,) = change
    with pytest.raises(ConfigError, match=f"erase.leak.{name}"):
        check_leak(replace(LeakConfig(), **change), "erase.leak")
