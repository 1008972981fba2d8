"""Bytes that training keeps a parameter, by kind, counted on the tensors themselves."""

from dataclasses import dataclass, field

from torch import Tensor

from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.scaled import ScaledTensor

KINDS = ("weight", "gradient", "m", "v", "scales")


@dataclass
class MemoryReport:
    """Elements and bytes of some parameters: weights of record, gradients, both moments, scales and amaxes."""

    num_elements: int = 0
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def per_parameter(self) -> dict[str, float]:
        """Bytes an element, by kind and in all."""
        each = {kind: num / max(1, self.num_elements) for kind, num in self.num_bytes.items()}
        return each | {"total": sum(each.values())}

    def _add(self, kind: str, *tensors: Tensor | None) -> None:
        self.num_bytes[kind] += sum(t.numel() * t.element_size() for t in tensors if t is not None)


def memory_report(optimizer: Fp8AdamW) -> tuple[MemoryReport, MemoryReport]:
    """Count what is held now: of the parameters kept as codes, and of the others.

    Call it after a step and before `zero_grad`, so that states and gradients are there.
    """
    coded, plain = MemoryReport(), MemoryReport()
    for group in optimizer.param_groups:
        for param in group["params"]:
            _count(coded if isinstance(param, ScaledTensor) else plain, param, optimizer)
    return coded, plain


def _count(report: MemoryReport, param: Tensor, optimizer: Fp8AdamW) -> None:
    state = optimizer.state.get(param, {})
    report.num_elements += param.numel()
    if isinstance(param, ScaledTensor):
        report._add("weight", param.codes)
        report._add("scales", param.scale)
    else:
        report._add("weight", param)
    report._add("gradient", param.grad)
    held = optimizer.gradients.of(param)
    if held is not None:
        report._add("gradient", held.q.codes)
        report._add("scales", held.q.scale, held.amax)
    report._add("m", state.get("exp_avg"))
    report._add("v", state.get("exp_avg_sq"))
    report._add(
        "scales", *(state.get(f"{key}_{what}") for key in ("exp_avg", "exp_avg_sq") for what in ("scale", "amax"))
    )
