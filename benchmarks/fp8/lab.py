"""What all parts of the FP8 benchmark share: rows that outlive a failure, times, peaks, bytes held, a copy's speed."""

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MEASURED, NO_MEMORY, NO_TIME = "measured", "out of memory", "not run: out of time"
FLUSH_BYTES = {"cuda": 2**28, "cpu": 2**26}
"""What is written between two measurements, so that none finds its data in a cache."""
COPY_BYTES = {"cuda": 2**32, "cpu": 2**28}
PATIENCE = 15.0
"""Seconds after which slow calls are timed no more."""
Numbers = Mapping[str, float | str | None]


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, of which system, and how it ended."""

    part: str
    case: str
    system: str
    status: str
    """"measured", or why it was not."""
    numbers: dict[str, Any] = field(default_factory=dict)


class Unavailable(Exception):
    """A system that cannot run here; its row says why."""


@dataclass
class Lab:
    """Where it is measured, how much, until when; and the rows so far, which go to a file as they come."""

    device: torch.device
    quick: bool
    compile: bool
    deadline: float
    out: Path
    say: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    def add(self, row: Row) -> Row:
        """Keep a row and write it down."""
        self.rows.append(row)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        shown = ", ".join(f"{key} {short(value)}" for key, value in row.numbers.items())
        self.say(f"{row.part}, {row.case}, {row.system}: {row.status} {shown}")
        return row

    def measure(self, part: str, case: str, system: str, run: Callable[[], Numbers]) -> Row:
        """Measure one row; what goes wrong becomes its status, and its memory is freed."""
        status, numbers = NO_TIME, {}
        if time.monotonic() < self.deadline:
            try:
                numbers, status = dict(run()), MEASURED
            except Exception as error:  # a peer may fail in any way, and the other rows still count
                status = reason(error)
            self.free()
        return self.add(Row(part, case, system, status, numbers))

    def free(self) -> None:
        """Let go of what the last system left behind, compiled code too."""
        if self.compile:
            torch.compiler.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """Say in a line why a system was not measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return NO_MEMORY
    if isinstance(error, Unavailable):
        return f"not run: {error}"
    if isinstance(error, ImportError):
        return f"not installed: {error}".splitlines()[0][:120]
    return f"failed: {type(error).__name__}: {error}".splitlines()[0][:160]


def short(value: object) -> str:
    """Show a number in few digits."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Time one call: by CUDA's events on a GPU, waits of the host included, else in processor seconds."""
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1000


def interleaved(
    device: torch.device, runs: Sequence[Callable[[], object]], repeats: int, warm_up: int = 2
) -> list[list[float]]:
    """Time some calls in turns, each turn beginning with another one, with caches flushed before each.

    Where they are slow, fewer turns are taken: one at least, after one to warm up.
    """
    scratch = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)
    turns: list[list[float]] = []
    end = time.monotonic() + PATIENCE
    while len(turns) < warm_up + repeats and (time.monotonic() < end or len(turns) < 2):
        first = len(turns) % len(runs)
        order = [*range(first, len(runs)), *range(first)]
        taken = dict.fromkeys(order, 0.0)
        for i in order:
            scratch.zero_()
            taken[i] = seconds(device, runs[i])
        turns.append([taken[i] for i in range(len(runs))])
    kept = turns[min(warm_up, len(turns) - 1) :]
    return [list(times) for times in zip(*kept, strict=True)]


def copy_bandwidth(lab: Lab) -> float:
    """Return the bytes a second, read and written, of a large copy on the device."""
    num = 2**24 if lab.quick else COPY_BYTES[lab.device.type]
    source = torch.ones(num, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    times = interleaved(lab.device, [lambda: target.copy_(source)], 3 if lab.quick else 9)[0]
    return 2 * num / median(times)


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Return how much more memory than before is held at most while something runs: as the allocator counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    now = most = 0
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors, of those inside of wrappers, each memory once."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        for plain in _plain(tensor):
            seen[plain.untyped_storage().data_ptr()] = plain.untyped_storage().nbytes()
    return sum(seen.values())


def _plain(tensor: Tensor) -> list[Tensor]:
    """List the ordinary tensors that a tensor is made of."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [plain for name in names for plain in _plain(vars(tensor)[name])]
    return [tensor]


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """List the tensors of an optimizer's states."""
    return [item for state in optimizer.state.values() for item in state.values() if isinstance(item, Tensor)]


def markdown(rows: Sequence[Row]) -> str:
    """Write a part's rows as a table: every number is a column, what was not measured says why."""
    columns = list(dict.fromkeys(key for row in rows for key in row.numbers))
    heads = ["case", "system", *columns]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        if row.status == MEASURED:
            cells = [short(row.numbers.get(key)) for key in columns]
        else:
            cells = [row.status.replace("|", "/")] + [""] * (len(columns) - 1)
        lines.append(f"| {' | '.join([row.case, row.system, *cells])} |")
    return "\n".join(lines)
