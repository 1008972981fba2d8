"""What the training stages share: values of held-out sequences over all ranks, and the plan of a dry run."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from postgrad.core.batches import check_train, num_steps, sequence_values
from postgrad.core.config import DataConfig, ModelConfig, TrainConfig
from postgrad.core.distributed import gather_objects
from postgrad.core.models import planned_parameters, training_memory_gib
from postgrad.core.precision import autocast
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
    check_train(train)


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
