"""Bytes that training keeps a parameter, by kind, counted on the tensors themselves."""

from dataclasses import dataclass, field

from torch import Tensor

from postgrad.fp8.gradients import Gradients
from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.scaled import ScaledTensor
from postgrad.fp8.zero import ShardedFp8AdamW

KINDS = ("weight", "record", "gradient", "m", "v", "scales")


@dataclass
class MemoryReport:
    """Elements and bytes of some parameters: weights, gradients, both moments, scales and amaxes.

    `record` are weights of record that are kept apart from the weights, as an owner does at level O3.
    """

    num_elements: int = 0
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def per_parameter(self) -> dict[str, float]:
        """Bytes an element, by kind and in all."""
        each = {kind: num / max(1, self.num_elements) for kind, num in self.num_bytes.items()}
        return each | {"total": sum(each.values())}

    def _add(self, kind: str, *tensors: Tensor | None) -> None:
        self.num_bytes[kind] += sum(t.numel() * t.element_size() for t in tensors if t is not None)


def memory_report(optimizer: Fp8AdamW | ShardedFp8AdamW) -> tuple[MemoryReport, MemoryReport]:
    """Count what this rank holds now: of the parameters kept as codes, and of the others.

    Call it after a step and before `zero_grad`, so that states and gradients are there.
    """
    coded, plain = MemoryReport(), MemoryReport()
    if isinstance(optimizer, ShardedFp8AdamW):
        _count_sharded(coded, plain, optimizer)
        return coded, plain
    for group in optimizer.param_groups:
        for param in group["params"]:
            _count(coded if isinstance(param, ScaledTensor) else plain, param, optimizer)
    return coded, plain


def _count_sharded(coded: MemoryReport, plain: MemoryReport, optimizer: ShardedFp8AdamW) -> None:
    """Count the codes that all ranks hold, and what this one owns."""
    for param in optimizer.plain:
        _count(plain, param, optimizer.inner)
    masters = optimizer.masters()
    for param in optimizer.coded:
        coded.num_elements += param.numel()
        _count_weight(coded, param, "weight")
        _count_gradient(coded, param, optimizer.gradients)
        if param in masters:
            _count_weight(coded, masters[param], "record")
            _count_states(coded, masters[param], optimizer.inner)


def _count(report: MemoryReport, param: Tensor, optimizer: Fp8AdamW) -> None:
    report.num_elements += param.numel()
    _count_weight(report, param, "weight")
    report._add("gradient", param.grad)
    _count_states(report, param, optimizer)


def _count_weight(report: MemoryReport, param: Tensor, kind: str) -> None:
    if isinstance(param, ScaledTensor):
        report._add(kind, param.codes)
        report._add("scales", param.scale)
    else:
        report._add(kind, param)


def _count_gradient(report: MemoryReport, param: Tensor, gradients: Gradients) -> None:
    held = gradients.of(param)
    if held is not None:
        report._add("gradient", held.q.codes)
        report._add("scales", held.q.scale, held.amax)


def _count_states(report: MemoryReport, param: Tensor, optimizer: Fp8AdamW) -> None:
    state = optimizer.state.get(param, {})
    _count_gradient(report, param, optimizer.gradients)
    report._add("m", state.get("exp_avg"))
    report._add("v", state.get("exp_avg_sq"))
    report._add(
        "scales", *(state.get(f"{key}_{what}") for key in ("exp_avg", "exp_avg_sq") for what in ("scale", "amax"))
    )
