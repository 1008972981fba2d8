"""How fast a model relearns what it forgot: what comes back at once was hidden, not gone.

A copy is finetuned on a few shots of the forgotten classes, and tested as it goes. Only the comparison with a model
that never saw the classes ("gold") tells of a leak: that one too learns, from the same shots in the same order. Fast
is a leak; slow is no proof of the opposite, since the first steps only mend an output pushed far down.

Letters: N samples.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from postgrad.core.runtime import stage_seed
from postgrad.errors import ConfigError, DataError

_TEST_ROWS = 512
"""Samples tested at a time."""


@dataclass(frozen=True, kw_only=True)
class RelearnConfig:
    """An attacker who finetunes on a few samples of the forgotten classes."""

    shots: int = 8
    """Samples of each class to finetune on."""
    steps: int = 100
    """Most steps to take."""
    batch: int = 16
    """Samples a step, at most all shots."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    test_every: int = 1
    """Steps between two tests."""


class Labelled(NamedTuple):
    """Inputs of a model (images, or cached activations for its last part) and their classes."""

    inputs: Tensor
    labels: Int[Tensor, " N"]


@dataclass(frozen=True)
class Relearned:
    """Accuracy on the forgotten classes as they are learnt again."""

    images: tuple[int, ...]
    """Training samples seen before each test; the first test is before training."""
    accuracy: tuple[float, ...]
    """Per cent of the forgotten test samples."""

    def images_to(self, share: float, original: float) -> int | None:
        """Count the samples until a share of the original accuracy is back; None if it never came back.

        Args:    original: the accuracy before forgetting, in per cent.
        """
        pairs = zip(self.images, self.accuracy, strict=True)
        return next((seen for seen, found in pairs if found >= share * original - 1e-9), None)


def relearn_ratio(found: Relearned, gold: Relearned, share: float, original: float) -> float:
    """Return samples needed over samples gold needs: below 1 the classes come back faster than they are learnt.

    Returns: inf where only gold got there; where only gold did not, its whole budget counts, and the true ratio is
             smaller still. NaN where neither did or gold needed none.
    """
    needed, golds = found.images_to(share, original), gold.images_to(share, original)
    if golds is None:
        return math.nan if needed is None else needed / max(gold.images[-1], 1)
    if golds == 0:
        return math.nan
    return math.inf if needed is None else needed / golds


def choose_shots(labels: Int[Tensor, " N"], classes: Sequence[int], shots: int, seed: int) -> Int[Tensor, " n"]:
    """Pick so many samples of each class, drawn from the seed; the places come class by class.

    Raises:  DataError: a class has fewer.
    """
    picked = []
    for label in classes:
        places = (labels == label).nonzero()[:, 0].cpu()
        if len(places) < shots:
            raise DataError(f"Relearning: expected {shots} samples of class {label}, found {len(places)}; lower shots.")
        generator = torch.Generator().manual_seed(stage_seed(seed, "shots", label))
        picked.append(places[torch.randperm(len(places), generator=generator)[:shots]])
    return torch.cat(picked).to(labels.device)


def seen_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Read the logits of a classifier that returns features and logits."""
    logits: Tensor = model(inputs).logits
    return logits


def relearn(
    model: nn.Module,
    shots: Labelled,
    test: Labelled,
    config: RelearnConfig,
    seed: int,
    *,
    read: Callable[[nn.Module, Tensor], Tensor] = seen_logits,
) -> Relearned:
    """Finetune a copy of the model, all of it, and test it as it goes; the model itself stays as it is.

    It runs in evaluation mode (no dropout, fixed statistics), so that two models differ by their weights alone.

    Args:    model: a Classifier; or the last part of one, with activations before it as inputs. shots: of the
             forgotten classes; with one class alone add retained ones, or always answering that class would do.
             test: of the forgotten classes. read: gives logits.
    """
    check_relearn(config)
    pupil = copy.deepcopy(model).eval().requires_grad_(True)
    device = next(pupil.parameters()).device
    optimizer = torch.optim.Adam(pupil.parameters(), lr=config.lr)
    batches = _batches(len(shots.labels), config.batch, seed)
    images, accuracy = [0], [_accuracy(pupil, test, read, device)]
    seen = 0
    for step in range(1, config.steps + 1):
        index = next(batches)
        seen += len(index)
        logits = read(pupil, shots.inputs[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, shots.labels[index].to(device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % config.test_every == 0 or step == config.steps:
            images.append(seen)
            accuracy.append(_accuracy(pupil, test, read, device))
    return Relearned(tuple(images), tuple(accuracy))


def check_relearn(config: RelearnConfig) -> None:
    """Refuse an attack that takes no step."""
    for name in ("shots", "steps", "batch", "test_every"):
        if vars(config)[name] < 1:
            raise ConfigError(f"{name}: expected 1 or more, found {vars(config)[name]}. Mend the relearning attack.")
    if config.lr <= 0:
        raise ConfigError(f"lr: expected a learning rate above 0, found {config.lr:g}. Mend the relearning attack.")


def _batches(num: int, size: int, seed: int) -> Iterator[Tensor]:
    """Deal the shots out in an order of their own each epoch, the same for every model."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(stage_seed(seed, "relearn", epoch))
        yield from torch.split(torch.randperm(num, generator=generator), size)
        epoch += 1


@torch.no_grad()
def _accuracy(
    model: nn.Module, test: Labelled, read: Callable[[nn.Module, Tensor], Tensor], device: torch.device
) -> float:
    """Return the per cent of test samples named rightly."""
    parts = zip(torch.split(test.inputs, _TEST_ROWS), torch.split(test.labels, _TEST_ROWS), strict=True)
    right = sum(int((read(model, inputs.to(device)).argmax(1) == labels.to(device)).sum()) for inputs, labels in parts)
    return 100 * right / len(test.labels)
