"""What a step adds up: sums with weights, over micro-batches and ranks, divided only when they are shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from postgrad.core.distributed import gather_objects, sum_over_ranks
from postgrad.core.runtime import Job, stop_requested
from postgrad.errors import PostgradError

LOSS = "loss"

Metric = tuple[Tensor | float, float]
"""A sum and the weight it is to be divided by."""


@dataclass(frozen=True)
class Loss:
    """What a micro-batch contributes to a step.

    sum: scalar to differentiate, not yet divided.   weight: what the sum counts (tokens, pairs), >= 0.
    metrics: more sums with weights, averaged like the loss and logged under their names.
    num_tokens: tokens computed on, for the rate.
    """

    sum: Float[Tensor, ""]
    weight: float
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    num_tokens: int = 0


@dataclass
class Tally:
    """What one step found.

    entries: of this rank, a name, a sum and a weight for each figure of each micro-batch.
    sums: over all ranks, by name; empty where the step was left out.
    measured: of the tensors themselves, where that was due.
    """

    entries: list[tuple[str, Tensor | float, float]] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    norm: float = 0.0
    stop: bool = False
    error: Exception | None = None
    measured: dict[str, object] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        """Add a micro-batch's figures, without its graph."""
        assert LOSS not in loss.metrics, f"a metric may not be called {LOSS!r}"
        self.tokens += loss.num_tokens
        for name, (value, weight) in ((LOSS, (loss.sum, loss.weight)), *loss.metrics.items()):
            self.entries.append((name, value.detach() if isinstance(value, Tensor) else value, weight))


def total_up(tally: Tally, norm: Float[Tensor, ""], names: list[str], job: Job) -> None:
    """Add a step's figures over micro-batches and ranks."""
    *values, tally.norm = _read([*(value for _, value, _ in tally.entries), norm], job.device)
    own: dict[str, list[float]] = {LOSS: [0.0, 0.0]}
    for (name, _, weight), value in zip(tally.entries, values, strict=True):
        entry = own.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += weight
    tally.entries.clear()
    tally.sums, tally.stop = own, stop_requested()
    if job.world > 1:
        _total_over_ranks(names, tally)


def _read(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """Bring scalars to the host together: a GPU is waited for once a step."""
    if device.type == "cpu":
        return [float(value) for value in values]
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    tensors = [value.to(device, torch.float64) for value in values if isinstance(value, Tensor)]
    numbers = [0.0 if isinstance(value, Tensor) else value for value in values]
    for i, number in zip(places, torch.stack(tensors).tolist(), strict=True):
        numbers[i] = number
    return numbers


def _total_over_ranks(names: list[str], tally: Tally) -> None:
    """Add a step's figures over the ranks, all in one message.

    A rank without micro-batches does not know what the others measure; when a name is new to any rank, all
    agree on the names again.
    """
    new = any(name not in names for name in tally.sums)
    head = [float(new), float(tally.tokens), float(tally.stop), float(tally.error is not None)]
    body = [number for name in names for number in tally.sums.get(name, [0.0, 0.0])]
    message = torch.tensor(head + body, dtype=torch.float64)
    num_new, tokens, stop, failed, *body = sum_over_ranks(message).tolist()
    if num_new:
        names[:] = sorted({name for own in gather_objects([*names, *tally.sums]) for name in own})
        _total_over_ranks(names, tally)
        return
    tally.sums = {name: [body[2 * i], body[2 * i + 1]] for i, name in enumerate(names)}
    tally.tokens, tally.stop = int(tokens), stop > 0
    if failed and tally.error is None:
        tally.error = PostgradError("Another rank failed, so this one stops too; its own message says why.")


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Divide each sum by its weight; what was not measured is left out."""
    return {name: value / weight for name, (value, weight) in sums.items() if weight != 0}
