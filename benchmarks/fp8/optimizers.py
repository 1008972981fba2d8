"""Part "optimizer": one step of Adam on a Llama's linear layers, ours and others', beside torch's fused float32.

Bytes moved are those of a model: every stored number that a step has to read or write, once. GB/s are these over the
time; "of copy" is their share of what a large copy on the device reaches in the same run. Gradients are there before
the step, in the system's own format. Ours also takes the norm of all gradients, to see that they are finite, a byte
more: the fair comparison for it is torch's with clipping.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.fp8.lab import Lab, Numbers, Unavailable, copy_bandwidth, held_bytes, interleaved, peak_bytes, states_of
from postgrad.fp8.adam import STATES, Hyper, adam, coefficients, hold
from postgrad.fp8.gradients import take
from postgrad.fp8.numerics import dequantize
from postgrad.fp8.optimizer import Fp8AdamW, Storing

PART = "optimizer"
LR, BETAS, EPS, DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
BASELINE = "torch AdamW, fused, float32"
Shape = tuple[int, int]


@dataclass(frozen=True)
class Stepper:
    """A system ready to step: the step, the tensors it holds, and the bytes a step has to move a parameter."""

    step: Callable[[], object]
    tensors: Callable[[], list[Tensor]]
    traffic: float | None


def shapes_of(lab: Lab) -> list[Shape]:
    """Return a Llama's linear layers: about 1e9 parameters on a GPU."""
    layers, width, inner, narrow = (16, 2048, 8192, 512) if lab.cuda else (3, 512, 1376, 512)
    if lab.quick:
        layers, width, inner, narrow = 1, 128, 352, 128
    one = [(width, width)] * 2 + [(narrow, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
    return one * layers


def weights(lab: Lab, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Draw weights of a trained model's size, and float32 gradients."""
    torch.manual_seed(0)
    params = []
    for shape in shapes_of(lab):
        params.append(Parameter((torch.randn(shape, device=lab.device) * 0.02).to(dtype)))
        params[-1].grad = (torch.randn(shape, device=lab.device) * 1e-3).to(dtype)
    return params


def _plain(optimizer: torch.optim.Optimizer, params: list[Parameter], traffic: float, clip: bool = False) -> Stepper:
    """Step an ordinary optimizer, after its gradients are clipped or not."""

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(params, 1e6, foreach=True)
        optimizer.step()

    def tensors() -> list[Tensor]:
        return [*params, *(param.grad for param in params if param.grad is not None), *states_of(optimizer)]

    return Stepper(step, tensors, traffic)


def torch_fused(lab: Lab, *, clip: bool = False, dtype: torch.dtype = torch.float32) -> Stepper:
    """torch's own; clipping reads the gradients, and reads and writes them again."""
    params, size = weights(lab, dtype), dtype.itemsize
    optimizer = torch.optim.AdamW(params, LR, BETAS, EPS, DECAY, fused=True)
    return _plain(optimizer, params, (7 + 3 * clip) * size, clip)


def ours(lab: Lab, traffic: float, *, known_norm: bool = False, **storing: object) -> Stepper:
    """Fp8AdamW, with the gradients' norm measured in the step or known before."""
    if "compile" in storing.values() and not lab.compile:
        raise Unavailable("compiling is off")
    if "triton" in storing.values() and not lab.cuda:
        raise Unavailable("its kernels need a GPU")
    if "torch" in storing.values() and lab.cuda:
        raise Unavailable("it goes in slices, for a CPU; on a GPU it only says which bits are right")
    params = weights(lab)
    gradients = [take(param.grad) for param in params if param.grad is not None]
    settings = {key: value for key, value in storing.items() if key in Storing.__annotations__}
    optimizer = Fp8AdamW(params, LR, BETAS, EPS, DECAY, **settings)  # type: ignore[arg-type]
    for param, gradient in zip(params, gradients, strict=True):
        optimizer.gradients.put(param, gradient)
    norm = torch.ones((), dtype=torch.float64, device=lab.device) if known_norm else None

    def tensors() -> list[Tensor]:
        codes = [part for held in gradients for part in (held.q.codes, held.q.scale, held.amax)]
        return [*params, *codes, *states_of(optimizer)]

    return Stepper(lambda: optimizer.step(norm=norm), tensors, traffic)


def eager_fp8(lab: Lab) -> Stepper:
    """The paper's states stepped tensor by tensor in whole float32, as its released code does: the control."""
    formats = STATES["paper"]
    found = []
    for param in weights(lab):
        assert param.grad is not None
        start = (param.detach(), torch.zeros_like(param.detach()), torch.zeros_like(param.detach()))
        states = [hold(x, f).q for x, f in zip(start, (formats.master, formats.m, formats.v), strict=True)]
        found.append((states, take(param.grad).q))
    steps = [0]

    def step() -> None:
        steps[0] += 1
        numbers = coefficients(Hyper(LR, *BETAS, EPS, DECAY, steps[0]), False)
        for states, gradient in found:
            w, m, v = (dequantize(q) for q in states)
            after = adam(w, m, v, dequantize(gradient), numbers)
            states[:] = [hold(x, q.format).q for x, q in zip(after, states, strict=True)]

    def tensors() -> list[Tensor]:
        return [part for states, g in found for q in (*states, g) for part in (q.codes, q.scale)]

    return Stepper(step, tensors, None)


def torchao(lab: Lab, *, sixteen: bool) -> Stepper:
    """torchao's 8-bit Adam: of float32 weights, or of BF16 ones with stochastic rounding."""
    from torchao.optim import AdamWFp8

    if not lab.compile:
        raise Unavailable("it compiles its step, and compiling is off")
    params = weights(lab, torch.bfloat16 if sixteen else torch.float32)
    optimizer = AdamWFp8(params, LR, BETAS, EPS, DECAY, bf16_stochastic_round=sixteen)
    return _plain(optimizer, params, 10 if sixteen else 16)


def bitsandbytes(lab: Lab) -> Stepper:
    """bitsandbytes' 8-bit Adam of float32 weights."""
    from bitsandbytes.optim import AdamW8bit

    params = weights(lab)
    return _plain(AdamW8bit(params, LR, BETAS, EPS, DECAY), params, 16)


def transformer_engine(lab: Lab, *, low: bool) -> Stepper:
    """TransformerEngine's Adam, with float32 states or with the paper's; traffic of the latter is not modelled."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    if not low:
        params = weights(lab)
        return _plain(FusedAdam(params, LR, betas=BETAS, eps=EPS, weight_decay=DECAY), params, 28)
    params = weights(lab, torch.bfloat16)
    optimizer = FusedAdam(
        params, LR, betas=BETAS, eps=EPS, weight_decay=DECAY, master_weights=True, master_weight_dtype=torch.half,
        exp_avg_dtype=torch.uint8, exp_avg_sq_dtype=torch.half,
    )  # fmt: skip
    return _plain(optimizer, params, 0.0)


SYSTEMS: dict[str, Callable[[Lab], Stepper]] = {
    f"{BASELINE}, clipping": lambda lab: torch_fused(lab, clip=True),
    "torch AdamW, fused, all BF16": lambda lab: torch_fused(lab, dtype=torch.bfloat16),
    "ours, triton": lambda lab: ours(lab, 12, backend="triton"),
    "ours, triton, norm known": lambda lab: ours(lab, 11, known_norm=True, backend="triton"),
    "ours, triton, stochastic": lambda lab: ours(lab, 12, backend="triton", rounding="stochastic"),
    "ours, triton, jit scales": lambda lab: ours(lab, 18, backend="triton", scales="jit"),
    "ours, torch": lambda lab: ours(lab, 12, backend="torch"),
    "ours, compile": lambda lab: ours(lab, 12, backend="compile"),
    "FP8 states, eager": eager_fp8,
    "torchao AdamWFp8, float32": lambda lab: torchao(lab, sixteen=False),
    "torchao AdamWFp8, BF16": lambda lab: torchao(lab, sixteen=True),
    "bitsandbytes AdamW8bit": bitsandbytes,
    "TE FusedAdam, float32": lambda lab: transformer_engine(lab, low=False),
    "TE FusedAdam, FP8 and FP16": lambda lab: transformer_engine(lab, low=True),
}


def _memory(lab: Lab, system: Stepper, num: int) -> Iterator[float]:
    """Yield the bytes a parameter that are held between steps, and at most through one."""
    held = held_bytes(system.tensors())
    yield held / num
    yield (held + peak_bytes(lab.device, system.step)) / num


def run(lab: Lab) -> None:
    """Measure every system in turns with torch's fused float32 Adam."""
    num = sum(rows * columns for rows, columns in shapes_of(lab))
    case, repeats = f"{num / 1e6:,.1f}M parameters", 3 if lab.quick else 21 if lab.cuda else 9
    bandwidth = copy_bandwidth(lab)
    baseline = None

    def numbers(system: Stepper, times: list[float], theirs: list[float]) -> Numbers:
        held, peak = _memory(lab, system, num)
        taken = median(times)
        speed = system.traffic * num / taken if system.traffic else None
        return {
            "ms": taken * 1000, "ratio to float32": median([b / a for a, b in zip(times, theirs, strict=True)]),
            "bytes moved": system.traffic or None, "GB/s": speed and speed / 1e9,
            "of copy": speed and speed / bandwidth, "bytes held": held, "peak bytes": peak,
        }  # fmt: skip

    def measured(make: Callable[[Lab], Stepper]) -> Numbers:
        if baseline is None:
            raise Unavailable("torch's float32 Adam could not be measured beside it")
        system = make(lab)
        times, theirs = interleaved(lab.device, [system.step, baseline.step], repeats)
        return numbers(system, times, theirs)

    def measured_baseline() -> Numbers:
        nonlocal baseline
        baseline = torch_fused(lab)
        times = interleaved(lab.device, [baseline.step], repeats)[0]
        return numbers(baseline, times, times)

    lab.measure(PART, case, "copy", lambda: {"GB/s": bandwidth / 1e9, "of copy": 1.0})
    lab.measure(PART, case, BASELINE, measured_baseline)
    for name, make in SYSTEMS.items():
        lab.measure(PART, case, name, lambda make=make: measured(make))  # type: ignore[misc]
