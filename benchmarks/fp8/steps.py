"""Parts "step" and "large": whole training steps of Llamas, at equal batch first, then at equal memory; and 13 billion.

A step is forward, loss, backward, clipping to a norm of 1 and AdamW. All systems have the same weights, rows and
settings, so that their losses after the same steps can be compared. Decoder layers are compiled where that works.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import LlamaForCausalLM

from benchmarks.fp8.lab import MEASURED, Lab, Numbers, Row, Unavailable, held_bytes, peak_bytes, reason, seconds
from benchmarks.fp8.lab import states_of as states
from benchmarks.fp8.llama import SHAPES, Shape, build, coded_share, count, keep, to_bf16, to_codes, tokens
from postgrad.core.config import OptimConfig, PrecisionConfig
from postgrad.fp8.levels import prepare

PART, LARGE = "step", "large"
LR, MAX_NORM = 1e-4, 1.0
REFERENCE = "BF16 AMP, float32 AdamW"
MOST_ROWS, ROOM = 64, 0.97
"""Times the equal batch, and of the memory at hand: where the search for the largest batch ends."""
TINY = PrecisionConfig(min_size=16)


@dataclass(frozen=True)
class Trainee:
    """A model and how it takes a step once its gradients are there."""

    model: LlamaForCausalLM
    step: Callable[[], object]
    optimizer: torch.optim.Optimizer
    forward: Callable[[], AbstractContextManager[object]]


def bf16_products(lab: Lab) -> AbstractContextManager[object]:
    """Compute in BF16 what can be."""
    return torch.autocast(lab.device.type, torch.bfloat16)


def plain(lab: Lab, model: LlamaForCausalLM, *, autocast: bool = True) -> Trainee:
    """Train with torch's fused AdamW."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, LR, (0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(model, step, optimizer, lambda: bf16_products(lab) if autocast else nullcontext())


def amp(lab: Lab, shape: Shape) -> Trainee:
    """Float32 weights and states, BF16 products: the usual."""
    return plain(lab, build(shape, lab.device, keep))


def all_bf16(lab: Lab, shape: Shape) -> Trainee:
    """BF16 weights, gradients and states; small updates are lost in it."""
    return plain(lab, build(shape, lab.device, to_bf16), autocast=False)


def ours(lab: Lab, shape: Shape, level: str) -> Trainee:
    """FP8 products, gradients and, at level O2, states."""
    model = build(shape, lab.device, to_codes)
    precision = PrecisionConfig() if shape.width >= PrecisionConfig().min_size else TINY
    config = OptimConfig(lr=LR, beta2=0.95, weight_decay=0.1)
    _, optimizer = prepare(model, config, "O1" if level == "O1" else "O2", precision)

    def step() -> None:
        optimizer.step(max_norm=MAX_NORM)
        optimizer.zero_grad()

    return Trainee(model, step, optimizer, lambda: bf16_products(lab))


def torchao(lab: Lab, shape: Shape) -> Trainee:
    """torchao's tensorwise FP8 products; weights, gradients and states in float32."""
    from torchao.float8 import convert_to_float8_training

    if not lab.cuda:
        raise Unavailable("its products need a GPU")
    model = build(shape, lab.device, keep)
    convert_to_float8_training(model, module_filter_fn=lambda module, name: "lm_head" not in name)
    return plain(lab, model)


def transformer_engine(lab: Lab, shape: Shape) -> Trainee:
    """TransformerEngine's FP8 products (its default recipe); weights, gradients and states in float32."""
    import transformer_engine.pytorch as te

    if not lab.cuda:
        raise Unavailable("its products need a GPU")
    model = build(shape, lab.device, keep)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            new = te.Linear(module.in_features, module.out_features, bias=False, params_dtype=torch.float32)
            new.weight = Parameter(module.weight.detach())
            model.model.set_submodule(name, new)
    trainee = plain(lab, model)

    @contextmanager
    def forward() -> Iterator[None]:
        with bf16_products(lab), te.fp8_autocast(enabled=True):
            yield

    return Trainee(model, trainee.step, trainee.optimizer, forward)


SYSTEMS: dict[str, Callable[[Lab, Shape], Trainee]] = {
    REFERENCE: amp,
    "ours, O2": lambda lab, shape: ours(lab, shape, "O2"),
    "all BF16, AdamW": all_bf16,
    "ours, O1": lambda lab, shape: ours(lab, shape, "O1"),
    "torchao float8, float32 AdamW": torchao,
    "TE FP8, float32 AdamW": transformer_engine,
}


def train_step(trainee: Trainee, batch: Tensor) -> Tensor:
    """Take one step; the loss before it."""
    with trainee.forward():
        loss = trainee.model(input_ids=batch, labels=batch).loss
    loss.backward()
    trainee.step()
    found: Tensor = loss.detach()
    return found


def held(trainee: Trainee) -> int:
    """Count the bytes of weights and states, between steps."""
    return held_bytes([*trainee.model.parameters(), *trainee.model.buffers(), *states(trainee.optimizer)])


def measured(lab: Lab, make: Callable[[Lab, Shape], Trainee], shape: Shape, rows: int, steps: int) -> Numbers:
    """Train for a few steps on one batch, compiled if it can be; then count memory in one more step."""
    if not lab.compile:
        return _trained(lab, make(lab, shape), shape, rows, steps) | {"compiled": "no"}
    trainee = None
    try:
        trainee = make(lab, shape)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for layer in trainee.model.model.layers:
            layer.compile(dynamic=False)
        return _trained(lab, trainee, shape, rows, steps) | {"compiled": "yes"}
    except (torch.OutOfMemoryError, ImportError, Unavailable):
        raise
    except Exception as error:  # whatever the compiler stumbles over; it is shown beside the numbers
        why = reason(error)
    del trainee
    lab.free()
    return _trained(lab, make(lab, shape), shape, rows, steps) | {"compiled": f"no: {why}"}


def _trained(lab: Lab, trainee: Trainee, shape: Shape, rows: int, steps: int) -> dict[str, float | str | None]:
    batch = tokens(shape, rows, lab.device)
    losses: list[Tensor] = []
    times = [seconds(lab.device, lambda: losses.append(train_step(trainee, batch))) for _ in range(2 + steps)]
    num, before = count(trainee.model), held(trainee)
    resting = torch.cuda.memory_allocated(lab.device) if lab.cuda else before
    peak = resting + peak_bytes(lab.device, lambda: train_step(trainee, batch))
    return {
        "rows": rows, "tokens/s": rows * shape.length / median(times[2:]), "ms": 1000 * median(times[2:]),
        "held GiB": before / 2**30, "held bytes a parameter": before / num, "peak GiB": peak / 2**30,
        "coded": coded_share(list(trainee.model.parameters())), f"loss, step {2 + steps}": float(losses[-1]),
    }  # fmt: skip


def larger(row: Row, budget: float) -> int:
    """Return how many rows should fit in a memory (GiB): what is not held grows with them."""
    rows, held_gib, peak = (float(row.numbers[key]) for key in ("rows", "held GiB", "peak GiB"))
    fit = int(rows * (budget * ROOM - held_gib) / max(peak - held_gib, 1e-9))
    return max(1, min(fit, MOST_ROWS * int(rows)))


def budget_of(lab: Lab, reference: Row) -> tuple[float, str]:
    """Return the memory (GiB) of the reference's run, or the device's where it does not fit."""
    if reference.status == MEASURED:
        return float(reference.numbers["peak GiB"]), "BF16 AMP's memory"
    if lab.cuda:
        return torch.cuda.get_device_properties(lab.device).total_memory / 2**30 * 0.95, "the device's memory"
    return 0.0, "no memory"


def tries(row: Row, budget: float) -> Iterator[int]:
    """Yield batches to try, the largest that should fit first."""
    most, own = larger(row, budget), row.numbers["rows"]
    yield from dict.fromkeys(rows for rows in (most, int(most * 0.9), int(most * 0.75)) if rows > own)


def at_equal_memory(lab: Lab, shape: Shape, found: dict[str, Row], steps: int) -> None:
    """Give every system the largest batch that fits in what the reference needs."""
    budget, what = budget_of(lab, found[REFERENCE])
    for name, row in found.items():
        if row.status != MEASURED or name == REFERENCE:
            continue
        case, best = f"{shape.name}, {what}", None
        for rows in tries(row, budget):
            best = lab.measure(PART, case, name, lambda: measured(lab, SYSTEMS[name], shape, rows, steps))  # noqa: B023
            if best.status == MEASURED and best.numbers["peak GiB"] <= budget:
                break
        if best is None:
            lab.add(Row(PART, case, name, "not run: no larger batch fits"))


def run(lab: Lab, shapes: list[str]) -> None:
    """Measure all shapes at equal batch, then at equal memory."""
    steps = 1 if lab.quick else 3 if lab.cuda else 5
    chosen = shapes or (["tiny"] if lab.quick else ["1b", "7b"] if lab.cuda else ["small"])
    found: dict[str, dict[str, Row]] = {}
    for shape in (SHAPES[name] for name in chosen):
        case = f"{shape.name}, {shape.rows} x {shape.length} tokens"
        found[shape.name] = {
            name: lab.measure(PART, case, name, lambda: measured(lab, make, shape, shape.rows, steps))  # noqa: B023
            for name, make in SYSTEMS.items()
        }
    for name in chosen:
        at_equal_memory(lab, SHAPES[name], found[name], 2 if lab.cuda else steps)


def run_large(lab: Lab) -> None:
    """Train 13 billion parameters for three steps on one device: ours, and whether others can."""
    shape = SHAPES["13b" if lab.cuda else "tiny"]
    case = f"{shape.name}, {shape.rows} x {shape.length} tokens"
    for name in ("ours, O2", "all BF16, AdamW", REFERENCE):
        lab.measure(LARGE, case, name, lambda: measured(lab, SYSTEMS[name], shape, shape.rows, 1))  # noqa: B023
