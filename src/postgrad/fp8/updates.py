"""What the training loop asks for, in FP8: gradients become codes as they are made, travel as codes, and are stepped.

Source:  FP8-LM (arXiv 2310.18313), section 2.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter

from postgrad.core.config import OptimConfig, PrecisionConfig
from postgrad.core.report import TENSORS
from postgrad.core.runtime import Job, stage_seed
from postgrad.core.sections import Section
from postgrad.fp8.averages import average_gradients
from postgrad.fp8.factors import keep_factor, keep_windows, resume_factor, resume_windows, windowed
from postgrad.fp8.levels import coded_parameters, prepare, restore
from postgrad.fp8.scaling_factor import ScalingFactor
from postgrad.fp8.watch import Watch, watch_sections
from postgrad.fp8.zero import ShardedFp8AdamW


class Fp8Updates:
    """One level of FP8 for the loop; see `postgrad.core.updates.Updates`."""

    def __init__(self, model: nn.Module, config: OptimConfig, precision: PrecisionConfig, job: Job) -> None:
        """Prepare the model, in place."""
        assert precision.level != "off", "without a level there is no FP8"
        self._model, self._precision, self._world = model, precision, job.world
        _, self.optimizer = prepare(model, config, precision.level, precision, stage_seed(job.seed, "rounding"))
        every = [param for group in self.optimizer.param_groups for param in group["params"]]
        coded = set(coded_parameters(model))
        self._coded: list[Parameter] = [param for param in every if param in coded]
        self._plain: list[Parameter] = [param for param in every if param not in coded]
        self._norm = torch.zeros((), dtype=torch.float64)
        self._factor: ScalingFactor | None = None
        if precision.reduction == "native" and self._coded:
            start, device = -math.log2(job.world) / 2, self._coded[0].device
            self._factor = ScalingFactor(len(self._coded), start=start, device=device)
            keep_factor(self.optimizer, self._coded, self._factor)
        self._windowed = windowed(model)
        keep_windows(self.optimizer, self._windowed)
        self._watch = Watch(model, precision.watch_every)

    def begin(self, step: int) -> None:
        """Take up what a checkpoint held; measure in the passes of a step, if that is due."""
        resume_windows(self.optimizer, self._windowed)
        if self._factor is not None:
            resume_factor(self.optimizer, self._coded, self._factor)
        self._watch.begin(step)

    def reduce(self) -> None:
        """Average the gradients over the ranks."""
        if isinstance(self.optimizer, ShardedFp8AdamW):
            self.optimizer.average()
            return
        with torch.no_grad():
            mode = self._precision.reduction
            average_gradients(self.optimizer.gradients, self._coded, self._plain, mode=mode, factor=self._factor)

    def norm(self) -> Float[Tensor, ""]:
        """Return the norm of the sum over ranks."""
        self._norm = self.optimizer.norm()
        return self._norm * self._world

    def step(self, weight: float, norm: float, clip: float) -> Mapping[str, object]:
        """Take a step; division and cut are part of the gradients' scales."""
        cut = max(1.0, norm / weight / clip) if clip else 1.0
        divide = weight / self._world * cut
        if isinstance(self.optimizer, ShardedFp8AdamW):
            found = self._watch.end(self.optimizer.inner, self.optimizer.masters(), 1 / divide)
        else:
            found = self._watch.end(self.optimizer, {param: param for param in self._coded}, 1 / divide)
        self.optimizer.step(divide=divide, max_norm=0.0, norm=self._norm)
        self.optimizer.zero_grad()
        return {TENSORS: found} if found else {}

    def skip(self) -> bool:
        """Drop the gradients; scales and states are as they were."""
        self.optimizer.zero_grad()
        return True

    def sections(self, rows: Sequence[Mapping[str, object]]) -> tuple[Section, ...]:
        """Plot what was measured."""
        return watch_sections(rows)

    def finish(self) -> None:
        """Leave an ordinary float32 model."""
        restore(self._model, self.optimizer)
