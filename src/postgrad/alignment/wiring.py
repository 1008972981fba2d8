"""What the training stages share: values of held-out sequences over all ranks, and the plan of a dry run."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from postgrad.core.batches import num_steps, sequence_values
from postgrad.core.config import DataConfig, ModelConfig, TrainConfig
from postgrad.core.distributed import gather_objects
from postgrad.core.models import planned_parameters, training_memory_gib
from postgrad.core.precision import autocast, check_precision
from postgrad.core.report import Table
from postgrad.core.rows import Rows, Tree
from postgrad.core.runtime import Job
from postgrad.errors import ConfigError

Plan = dict[str, str | int | float]


@torch.no_grad()
def spread_values(
    trees: Sequence[Tree], batches: Sequence[Rows], function: Callable[[Rows], Tensor], job: Job
) -> list[list[float]]:
    """Compute one value a sequence without gradients, each rank a share of the batches; all ranks get all.

    Args: function: rows -> [S]; its model is in evaluation mode.
    Returns: the values tree by tree, in the order of ``trees``.
    """
    mine = (rows.to(job.device) for rows in batches[job.rank :: job.world])
    with autocast(job):
        parts = gather_objects(sequence_values(trees, mine, function))
    return [next((values for values in column if values), []) for column in zip(*parts, strict=True)]


def check_training(data: DataConfig, train: TrainConfig) -> None:
    """Refuse numbers no training stage can use."""
    if not 0 <= data.held_out < 1:
        raise ConfigError(f"data.held_out is a share of the prompts, from 0 to below 1, got {data.held_out}.")
    for name, value in (("batch_size", train.batch_size), ("micro_tokens", train.micro_tokens)):
        if value < 1:
            raise ConfigError(f"train.{name} must be >= 1, got {value}.")
    check_precision(train.precision)
    if train.max_steps == 0 and not train.epochs > 0:
        raise ConfigError(f"train.epochs must be > 0 unless train.max_steps is set, got {train.epochs}.")


def training_plan(num_items: int, counts: Mapping[str, int], model: ModelConfig, train: TrainConfig) -> Plan:
    """Say what a training stage would do: rows, steps, parameters, memory."""
    total, trainable = planned_parameters(model)
    return {
        **{f"rows {reason}": num for reason, num in counts.items()},
        "items trained on": num_items,
        "optimizer steps": num_steps(num_items, train),
        "parameters": total,
        "trainable parameters": trainable,
        "memory without activations (GiB)": round(training_memory_gib(total, trainable), 3),
    }


def counts_table(counts: Mapping[str, int]) -> Table:
    """Show what became of the rows read: nothing is dropped silently."""
    return Table("Data", ("rows", "number"), tuple(counts.items()))
