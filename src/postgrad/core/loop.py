"""The one optimisation loop: accumulate, clip, step, log, evaluate, save, resume.

A loss is returned as a sum and a weight. Gradients of the sums are added over micro-batches and ranks and divided
once by the total weight, so 1x8 equals 8x1 and one rank equals four.

What a step depends on is the seed, its number and the tensors: a run that was stopped anywhere and started again
ends in the same bytes as one that never was.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from postgrad.core.ahead import Ahead, Batches
from postgrad.core.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from postgrad.core.config import TrainConfig
from postgrad.core.distributed import broadcast_parameters, first_rank, on_every_rank
from postgrad.core.files import flush
from postgrad.core.optim import schedule, set_lr
from postgrad.core.precision import autocast, updates_of
from postgrad.core.report import METRICS, TIMING, Report, log_metrics, read_metrics, training_sections
from postgrad.core.run_folder import cut_log
from postgrad.core.runtime import Job, progress, stage_seed, stop_on_signals
from postgrad.core.sections import Section
from postgrad.core.tally import LOSS, Loss, Metric, Tally, means, total_up
from postgrad.core.updates import Updates
from postgrad.errors import ArtefactError, ConfigError, DataError, Diverged, Interrupted

__all__ = ["ENOUGH", "Batches", "Loss", "Metric", "train"]

ENOUGH = "enough"
"""A figure of an evaluation: above 0, training ends there."""
MOST_SKIPPED = 10
"""Steps in a row that training of few bits leaves out, their gradients not being finite, before it gives up."""

LossFunction = Callable[[Any, int], Loss]
Evaluate = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class _Run:
    """What stays the same from step to step."""

    model: nn.Module
    updates: Updates
    batches: Batches
    loss_fn: LossFunction
    evaluate: Evaluate | None
    config: TrainConfig
    job: Job
    names: list[str] = field(default_factory=list)  # of the figures, as the ranks have agreed

    @property
    def total(self) -> int:
        return len(self.batches)

    @property
    def checkpoints(self) -> Path:
        return self.job.folder / "checkpoints"


@dataclass
class _State:
    """Where training stands: what a checkpoint holds besides tensors.

    sums: by name, sum and weight since the last row of metrics.jsonl.   results: of the last evaluation.
    skipped: steps left out, in all and in a row.
    """

    step: int = 0
    tokens: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0


def train(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFunction,
    evaluate: Evaluate | None,
    config: TrainConfig,
    job: Job,
) -> Report:
    """Train what is trainable in `model`, continuing from the newest checkpoint in the run folder.

    The model comes back in evaluation mode, trained. When the run was trained to its end before, its weights are
    loaded and nothing is computed.

    Args:    loss_fn: (micro-batch, step from 0) -> Loss; computed in the job's precision.
             evaluate: number of steps taken -> figures; run without gradients, in evaluation mode, on every rank. A
             figure ENOUGH above 0 ends the training.
    Returns: a report with the last evaluation's figures (without `evaluate`: the last loss) and the curves.
    Raises:  Diverged: a loss or gradient norm is not finite; no step was taken with it. Training in FP8 goes on
             without such steps, counts them, and raises at the tenth in a row.
             Interrupted: a signal asked to stop; the state is saved.
             ArtefactError: the checkpoints are damaged or belong to another model or data.
    """
    run = _prepare(model, batches, loss_fn, evaluate, config, job)
    state = _resume(run)
    model.train()
    with (
        stop_on_signals(),
        Ahead(batches) as ahead,
        progress(job, run.total, job.method, state.step) as bar,
    ):
        clock = _Clock(job)
        while not _ended(run, state):
            step = _take_step(run, state, ahead)
            bar.advance(note=_record(run, state, step, clock))
            if _due(run, state.step, config.save_every) or step.stop or _ended(run, state):
                _save(run, state)
                clock.restart()
            if step.stop:
                raise Interrupted(f"Step {state.step} of {run.total} is saved in {run.checkpoints}.")
    model.eval()
    run.updates.finish()
    sections = _sections(run) if job.rank == 0 else ()
    return Report(job.method, job.folder, state.results, sections)


def _prepare(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFunction,
    evaluate: Evaluate | None,
    config: TrainConfig,
    job: Job,
) -> _Run:
    """Check that there is something to train and to train on; make the optimizer."""
    params = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise ConfigError(f"{type(model).__name__} has no parameter that trains: all are frozen.")
    if len(batches) == 0:
        raise DataError("There is no step to train: the data is empty. Check data.path and train.epochs.")
    broadcast_parameters(params)
    updates = on_every_rank(lambda: updates_of(model, params, config, job))
    return _Run(model, updates, batches, loss_fn, evaluate, config, job)


def _resume(run: _Run) -> _State:
    """Continue from the newest checkpoint, or begin; the logs are cut back to where it stands."""
    path = first_rank(lambda: latest_checkpoint(run.checkpoints))
    state = _State()
    if path is not None:
        extra = on_every_rank(lambda: load_checkpoint(path, run.model, run.updates.optimizer))
        if extra["total"] != run.total:
            raise ArtefactError(
                f"{path} belongs to a run of {extra['total']} steps, but the data now makes {run.total}. "
                "Bring the data back as it was, or choose another runtime.folder."
            )
        state = _State(**extra["state"])

    def cut() -> None:
        for name in (METRICS, TIMING):
            cut_log(run.job.folder / name, state.step)

    first_rank(cut)
    return state


def _take_step(run: _Run, state: _State, ahead: Ahead) -> Tally:
    """Compute one optimizer step and take it."""
    _seed(run.job, "step", state.step, run.job.rank)
    run.updates.begin(state.step)
    step = _accumulate(run, state.step, ahead)
    run.updates.reduce()
    total_up(step, run.updates.norm(), run.names, run.job)
    if not _refuse(run, state, step):
        return step
    optim = run.config.optim
    shape: dict[str, Any] = {"kind": optim.schedule, "warmup": optim.warmup, "final": optim.final}
    factor = schedule(state.step, run.total, **shape, stairs=optim.stairs)
    set_lr(run.updates.optimizer, optim.lr * factor)
    step.measured = dict(run.updates.step(step.sums[LOSS][1], step.norm, optim.clip))
    return step


def _accumulate(run: _Run, number: int, ahead: Ahead) -> Tally:
    """Add up gradients of the sums of this rank's micro-batches."""
    step = Tally()
    try:
        for batch in ahead.take(number):
            with autocast(run.job):
                loss = run.loss_fn(batch, number)
            if loss.sum.requires_grad:  # not when nothing in this micro-batch is a target
                loss.sum.backward()  # type: ignore[no-untyped-call]
            step.add(loss)
    except Exception as error:
        if run.job.world == 1:
            raise
        step.error = error  # raised once all ranks have met, so that none waits for this one
    return step


def _refuse(run: _Run, state: _State, step: Tally) -> bool:
    """Raise instead of taking a step that failed, counts nothing, or is not finite; False: leave it out and go on."""
    if step.error is not None:
        raise step.error
    total, weight = step.sums[LOSS]
    where = f"Step {state.step + 1} of {run.total}"
    if weight == 0:
        raise DataError(
            f"{where}: expected something to learn from, but the loss has weight 0 on all its micro-batches. "
            "Look for rows without supervised tokens."
        )
    assert weight > 0, f"the weight of a loss must be >= 0, found {weight}"
    if math.isfinite(total) and math.isfinite(step.norm):
        state.skipped_in_a_row = 0
        return True
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row < MOST_SKIPPED and run.updates.skip():
        state.skipped += 1
        step.sums.clear()
        return False
    found = ", ".join(f"{name} {value:.4g}" for name, value in means(step.sums).items())
    good = list_checkpoints(run.checkpoints)
    raise Diverged(
        f"{where}: expected a finite loss and gradient norm, found {found}, gradient norm "
        f"{step.norm / weight:.4g}. The step was not taken; the last good state is "
        f"{good[-1] if good else 'the start'}. Lower train.optim.lr, or look at the data of this step."
    )


def _record(run: _Run, state: _State, step: Tally, clock: "_Clock") -> str:
    """Add a step to the state; log and evaluate when it is time. Returns a note for the screen."""
    state.step += 1
    state.tokens += step.tokens
    for name, (value, weight) in step.sums.items():
        entry = state.sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += weight
    clock.lap(step.tokens)
    if step.measured and run.job.rank == 0:
        log_metrics(run.job.folder, {"step": state.step, **step.measured})
    note = _log(run, state, step, clock) if _due(run, state.step, run.config.log_every) else ""
    if run.evaluate is not None and _due(run, state.step, run.config.eval_every):
        _evaluate(run, run.evaluate, state)
        clock.restart()
    return note


def _log(run: _Run, state: _State, step: Tally, clock: "_Clock") -> str:
    """Write a row of means since the last row, and one of seconds; return a note for the screen."""
    shown = means(state.sums)
    state.sums.clear()
    if LOSS not in shown:
        return f"{state.skipped} steps left out"
    loss = shown.pop(LOSS)
    if run.evaluate is None:
        state.results = {LOSS: loss}
    timing = clock.row()
    if run.job.rank == 0:
        norm = step.norm / step.sums[LOSS][1] if step.sums else math.nan
        optimizer = {"lr": run.updates.optimizer.param_groups[0]["lr"], "grad_norm": norm, "tokens": state.tokens}
        optimizer |= {"skipped_steps": state.skipped} if state.skipped else {}
        row = {"step": state.step, LOSS: loss, **dict(sorted(shown.items())), **optimizer}
        log_metrics(run.job.folder, row)
        log_metrics(run.job.folder, {"step": state.step, **timing}, TIMING)
    rate = timing["tokens_per_second"]
    return f"loss {loss:.4g}" + (f", {rate:,.0f} tokens/s" if rate else "")


def _evaluate(run: _Run, evaluate: Evaluate, state: _State) -> None:
    """Evaluate on every rank, log the figures, and keep them."""

    def figures() -> dict[str, float]:
        _seed(run.job, "evaluate", state.step)
        with torch.no_grad(), autocast(run.job):
            return {name: float(value) for name, value in evaluate(state.step).items()}

    run.model.eval()
    state.results = on_every_rank(figures)
    run.model.train()
    if run.job.rank == 0:
        row = {f"eval/{name}": value for name, value in state.results.items()}
        log_metrics(run.job.folder, {"step": state.step, **row})


def _sections(run: _Run) -> tuple[Section, ...]:
    """Plot what was logged."""
    return (*training_sections(run.job.folder), *run.updates.sections(read_metrics(run.job.folder)))


def _save(run: _Run, state: _State) -> None:
    """Write a checkpoint, after the log rows that belong to it."""
    extra = {"total": run.total, "state": asdict(state)}
    optimizer = run.updates.optimizer
    kept = optimizer.state_dict()  # the ranks may have to bring it together

    def write() -> None:
        for path in (run.job.folder / METRICS, run.job.folder / TIMING):
            if path.exists():
                flush(path)
        keep = run.config.keep_checkpoints
        save_checkpoint(run.checkpoints, state.step, run.model, optimizer, extra, keep, kept)

    first_rank(write)


def _ended(run: _Run, state: _State) -> bool:
    """Tell whether no step is left, or none is needed."""
    return state.step >= run.total or state.results.get(ENOUGH, 0.0) > 0


def _due(run: _Run, done: int, every: int) -> bool:
    """Tell whether something happens after `done` steps: every so many (0 = never), and at the end."""
    return done == run.total or (every > 0 and done % every == 0)


def _seed(job: Job, *parts: object) -> None:
    """Key torch's random numbers, so that none depends on what was drawn before."""
    seed = stage_seed(job.seed, *parts)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long
    if job.device.type == "cuda":
        torch.cuda.manual_seed(seed)


class _Clock:
    """Measures training, without evaluations and checkpoints."""

    def __init__(self, job: Job) -> None:
        self._device = job.device
        self._seconds, self._tokens = 0.0, 0
        self._mark = time.perf_counter()

    def restart(self) -> None:
        """Leave out the time since the last lap."""
        self._mark = time.perf_counter()

    def lap(self, tokens: int) -> None:
        """Count a step."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
        self._tokens += tokens

    def row(self) -> dict[str, float]:
        """Sum up the laps since the last row."""
        seconds, tokens = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        rate = tokens / seconds if seconds > 0 else 0.0
        return {"seconds": seconds, "tokens_per_second": rate, "peak_memory_gib": peak}
