"""From the gradients that a step has added up to new weights: the part of training that number formats change.

The loop calls, in this order: `begin`, `reduce`, `norm`, then `step`, or `skip` where the norm is not finite; `finish`
at the end. `FullUpdates` keeps weights, gradients and optimizer in float32; `postgrad.fp8` has one of 8 bits.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from postgrad.core.config import OptimConfig
from postgrad.core.distributed import all_reduce_gradients
from postgrad.core.optim import global_norm, gradients, make_optimizer, scale_gradients
from postgrad.core.sections import Section


@runtime_checkable
class Updates(Protocol):
    """What turns gradients into new weights."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, whose state a checkpoint holds; its state_dict may need all ranks."""
        ...

    def begin(self, step: int) -> None:
        """Prepare for the passes of a step, numbered from 0."""
        ...

    def reduce(self) -> None:
        """Add the gradients over the ranks."""
        ...

    def norm(self) -> Float[Tensor, ""]:
        """Return the norm of all gradients taken as one vector; not finite where one of them is not."""
        ...

    def step(self, weight: float, norm: float, clip: float) -> Mapping[str, object]:
        """Take a step with gradients divided by `weight` and cut to a norm of at most `clip`, then drop them.

        Args: weight: > 0.   norm: of the gradients before the division.   clip: 0 = no cut.
        Returns: what was measured of the tensors, for the log; empty where nothing was due.
        """
        ...

    def skip(self) -> bool:
        """Drop gradients that are not finite; return whether training may go on without this step."""
        ...

    def sections(self, rows: Sequence[Mapping[str, object]]) -> tuple[Section, ...]:
        """Show what steps measured, from the rows of the log."""
        ...

    def finish(self) -> None:
        """Leave an ordinary float32 model."""
        ...


class FullUpdates:
    """AdamW on float32 weights and gradients."""

    def __init__(self, params: Sequence[Parameter], config: OptimConfig) -> None:
        """Make the optimizer of these parameters."""
        self._params = params
        self.optimizer: Optimizer = make_optimizer(params, config)

    def begin(self, step: int) -> None:
        """Do nothing."""

    def reduce(self) -> None:
        """Add the gradients over the ranks, in float32."""
        all_reduce_gradients(self._params)

    def norm(self) -> Float[Tensor, ""]:
        """Return the norm of all gradients."""
        return global_norm(gradients(self._params))

    def step(self, weight: float, norm: float, clip: float) -> Mapping[str, object]:
        """Scale the gradients in place and take a step."""
        found = gradients(self._params)
        assert found, "the loss depends on no parameter that trains: none received a gradient"
        scale_gradients(found, weight=weight, norm=norm, clip=clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {}

    def skip(self) -> bool:
        """Return False: in float32 a number that is not finite is no rounding."""
        return False

    def sections(self, rows: Sequence[Mapping[str, object]]) -> tuple[Section, ...]:
        """Show nothing."""
        return ()

    def finish(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()
