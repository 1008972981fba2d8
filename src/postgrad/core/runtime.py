"""The frame of a run: its folder, seed, device and ranks, its progress on the screen, and signals to stop."""

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from postgrad.core.config import ModelConfig, RuntimeConfig
from postgrad.core.distributed import first_rank, init_ranks, rank, world
from postgrad.core.report import Report, write_report
from postgrad.core.run_folder import read_result, release_folder, take_folder, write_result
from postgrad.errors import ConfigError, Interrupted


@runtime_checkable
class Config(Protocol):
    """What a method's config has at least."""

    @property
    def runtime(self) -> RuntimeConfig:
        """Where and how the run happens."""
        ...


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Job:
    """A started run."""

    method: str
    folder: Path
    seed: int
    device: torch.device
    dtype: torch.dtype
    rank: int
    world: int
    quiet: bool


def start(config: C, check: Callable[[C], None], method: str) -> Job:
    """Check the config, take the run folder, and prepare device, ranks and seeds.

    The folder is held until `finish`; when the process ends in any way, the system lets go of it. A folder
    with the same configuration is continued. May be called many times in a process, for stages one after
    another or nested.

    Raises:  ConfigError: `check` refuses; another process holds the folder, or another configuration is in
             it; the device is not there.
    """
    check(config)
    runtime = config.runtime
    device = _choose_device(runtime)
    init_ranks(device)
    folder = Path(runtime.folder or f"runs/{method}")
    _set_threads(runtime.threads, tiny=vars(config).get("model", ModelConfig(path="")).path == "tiny")
    _set_deterministic(runtime.deterministic)
    first_rank(lambda: take_folder(folder, config, method, device))
    random.seed(runtime.seed)
    np.random.seed(runtime.seed % 2**32)
    torch.manual_seed(runtime.seed)
    return Job(
        method=method,
        folder=folder,
        seed=runtime.seed,
        device=device,
        dtype=torch.bfloat16 if runtime.precision == "bf16" else torch.float32,
        rank=rank(),
        world=world(),
        quiet=runtime.quiet,
    )


def finish(job: Job, report: Report) -> Report:
    """Record what the run found, let go of its folder, and return the report.

    result.json holds the results and nothing that differs from one machine or day to the next; the sections,
    whose plots may show seconds, go to sections.json and report.html.
    """

    def write() -> None:
        write_report(report, f"postgrad {report.method}")
        write_result(report)  # last: it says that the run is finished

    first_rank(write)
    release_folder(job.folder)
    return report


def finished(job: Job) -> Report | None:
    """Return the report of a run that was finished earlier, or None; a method asks right after `start`.

    The folder is let go of when there is one, as by `finish`.
    """
    report = first_rank(lambda: read_result(job.folder))
    if report is not None:
        release_folder(job.folder)
    return report


def stage_seed(seed: int, *parts: object) -> int:
    """Derive a 63-bit seed for one purpose: random choices are keyed, none depends on what was drawn before.

    Args:    parts: names and numbers of the choice, for instance "order", epoch; told apart by their text.
    """
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


_stop = threading.Event()
_stop_depth = 0


def stop_requested() -> bool:
    """Tell whether a signal to stop came since the outermost `stop_on_signals` was entered."""
    return _stop.is_set()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C ask for a stop at the next good moment; a second Ctrl-C stops at once.

    The block looks at `stop_requested`, saves, and raises `Interrupted`. A signal that came too late for that
    raises `Interrupted` when the outermost block ends, so none is lost. Outside the main thread signals stay
    as they are.
    """
    global _stop_depth
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _stop_depth == 0:
        _stop.clear()
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    _stop_depth += 1
    try:
        yield
    finally:
        _stop_depth -= 1
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        asked = _stop_depth == 0 and _stop.is_set()
        if asked:
            _stop.clear()  # answered: here, or by the Interrupted on its way out
    if asked:
        raise Interrupted("Stopped after the work at hand was saved.")


def _on_signal(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and _stop.is_set():
        raise KeyboardInterrupt
    # os.write, because print may be what the signal interrupted.
    os.write(2, b"\nStopping once the work at hand is saved; Ctrl-C again stops at once.\n")
    _stop.set()


class progress:
    """Show how far a piece of work is, on the standard error output.

    A bar with rate and time left on a terminal, elsewhere a line every tenth of the way; nothing when the job
    is quiet or on ranks other than the first. Use as a context manager and call `advance`.

    Args:    total: number of items.   label: what is being done.   done: items done earlier, which took no
             time now.
    """

    _bar_shown: ClassVar[bool] = False  # one bar at a time: a stage within another's bar prints lines

    def __init__(self, job: Job, total: int, label: str, done: int = 0) -> None:
        self._silent = job.quiet or job.rank > 0
        self._total, self._label, self._done, self._first = total, label, done, done
        self._console = Console(stderr=True, highlight=False)
        self._note = ""
        self._bar: Progress | None = None
        self._began = time.monotonic()

    def __enter__(self) -> "progress":
        """Begin to show."""
        if not self._silent and self._console.is_terminal and not progress._bar_shown:
            progress._bar_shown = True
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=self._console,
            )
            self._bar.start()
            self._bar.add_task(self._label, total=self._total, completed=self._done, note="")
        return self

    def __exit__(self, *error: object) -> None:
        """Stop showing; the last state stays on the screen."""
        if self._bar is not None:
            self._bar.stop()
            progress._bar_shown = False

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more items as done; a `note` is shown until the next one."""
        before, self._done, self._note = self._done, self._done + n, note or self._note
        if self._silent:
            return
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.advance(task, n)
            if note:
                self._bar.update(task, note=note)
        elif 10 * before // max(1, self._total) != 10 * self._done // max(1, self._total):
            self._print_line()

    def _print_line(self) -> None:
        seconds = max(1e-9, time.monotonic() - self._began)
        rate = (self._done - self._first) / seconds
        left = timedelta(seconds=round((self._total - self._done) / rate)) if rate > 0 else "?"
        text = f"{self._label} {self._done}/{self._total}, {_rate_text(rate)}, {left} left"
        self._console.print(Text(f"{text}, {self._note}" if self._note else text), soft_wrap=True)


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text(_rate_text(task.finished_speed or task.speed or 0.0))


def _rate_text(rate: float) -> str:
    return f"{rate:.3g}/s" if rate < 1000 else f"{rate:,.0f}/s"


def _choose_device(runtime: RuntimeConfig) -> torch.device:
    """Find the device asked for, or say why it cannot be had."""
    there = torch.cuda.is_available()
    if runtime.device == "cpu" or (runtime.device == "auto" and not there):
        return torch.device("cpu")
    if not there:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ConfigError(
            f"runtime.device: 'cuda' is asked for, but torch {torch.__version__} ({build}) finds no CUDA "
            "device. Set runtime.device to 'cpu' or 'auto', or install a torch build and a driver for the GPU."
        )
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f"runtime.device: rank {index} of this machine needs a GPU of its own, but torch finds {count}. "
            f"Start at most {count} processes on it (torchrun --nproc-per-node {count})."
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    if runtime.precision == "bf16" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"runtime.precision: {name} cannot compute in bf16. Set it to 'fp32'.")
    return device


def _set_threads(threads: int, tiny: bool) -> None:
    """Set the threads asked for; else share the cores between ranks unless the environment says how many each has.

    The tiny model's operations are too short to be worth waking a second thread for.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads or tiny:
        torch.set_num_threads(threads or 1)
    elif ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def _set_deterministic(deterministic: bool) -> None:
    """Choose deterministic kernels where torch has them.

    On a GPU an operation that has none warns instead of failing: the run is then as reproducible as it can
    be.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
    torch.use_deterministic_algorithms(deterministic, warn_only=torch.cuda.is_available())
    # On by default where kernels are deterministic; it costs time, and nothing here reads what it never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False
