"""Log-probabilities under the reference model: computed once, kept as a store, never computed in training.

A row is one answer: its pair, its side, the hash of the model that scored it, a key of the model and of all tokens
read, the sum in nats, and the number of its tokens. A stopped run continues with the shard it stopped at.

Letters: G prompts, K answers of a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor, nn

from postgrad.core.batches import sequence_values
from postgrad.core.distributed import barrier, first_rank
from postgrad.core.models import model_hash
from postgrad.core.precision import autocast
from postgrad.core.rows import Rows, Tree
from postgrad.core.runtime import Job, progress, stop_on_signals, stop_requested
from postgrad.core.store import content_hash, has_shard, is_sealed, read_store, seal, shard_path, write_shard
from postgrad.errors import ArtefactError, Interrupted

SHARD_TREES = 1024
"""Prompts a shard: what a stopped run loses at most."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("side", pa.string()),
        ("model_hash", pa.string()),
        ("key", pa.string()),
        ("sum", pa.float64()),
        ("n_tokens", pa.int32()),
    ]
)
Batch = Callable[[Sequence[Tree]], Sequence[Rows]]


def reference_logprobs(
    model: nn.Module,
    trees: Sequence[Tree],
    ids: Sequence[str],
    *,
    batch: Batch,
    function: Callable[[Rows], Tensor],
    variant: str,
    job: Job,
) -> Float[Tensor, "G K"]:
    """Return the log-probability of every answer, from the run's store; compute and store what is missing.

    Args:
        model: the reference in evaluation mode. ids: names of the trees.
        batch: trees -> micro-batches. function: rows -> [S], of the model.
        variant: what else the numbers depend on (how tokens are weighted); part of each row's key.
    Raises:
        ArtefactError: the store belongs to another model or other data.
        Interrupted: a signal asked to stop; the shards written stay.
    """
    folder, name = job.folder / "reference", model_hash(model)
    wanted = [row for tree, id_ in zip(trees, ids, strict=True) for row in _rows(tree, id_, name, variant)]
    if not is_sealed(folder):
        _write_missing(folder, trees, wanted, batch=batch, function=function, job=job)
        barrier()
        settings = {"variant": variant, "shard_trees": SHARD_TREES}
        first_rank(
            lambda: seal(
                folder, stage="reference", settings=settings, parents={"model": name}, counts={"rows": len(wanted)}
            )
        )
    rows = read_store(folder)
    if not _same(rows, wanted):
        raise ArtefactError(
            f"{folder} holds log-probabilities of another model or of other answers than this run's. Bring model "
            "and data back as they were, choose another runtime.folder, or remove this store."
        )
    return torch.tensor([row["sum"] for row in rows], dtype=torch.float32).view(len(trees), -1)


def _rows(tree: Tree, id_: str, name: str, variant: str) -> Iterator[dict[str, Any]]:
    """Describe a tree's answers, their sums still unknown; an answer's sum may depend on the others' lengths."""
    sizes = [len(answer) for answer in tree.answers]
    for side, answer in enumerate(tree.answers):
        yield {
            "id": id_,
            "side": "chosen" if side == 0 else "rejected" if side == 1 else f"rejected {side}",
            "model_hash": name,
            "key": content_hash([name, variant, tree.prompt, answer, sizes if variant else []]),
            "n_tokens": len(answer),
        }


def _write_missing(
    folder: Path,
    trees: Sequence[Tree],
    wanted: Sequence[dict[str, Any]],
    *,
    batch: Batch,
    function: Callable[[Rows], Tensor],
    job: Job,
) -> None:
    """Compute this rank's shards that are not there yet."""
    num_shards = -(-len(trees) // SHARD_TREES)
    width = len(wanted) // len(trees)
    with stop_on_signals(), progress(job, num_shards, "reference") as bar:
        for shard in range(num_shards):
            part = trees[shard * SHARD_TREES : (shard + 1) * SHARD_TREES]
            rows = wanted[shard * SHARD_TREES * width :][: len(part) * width]
            if shard % job.world == job.rank and not _has(folder, shard, rows):
                sums = _sums(part, batch(part), function, job)
                full = [{**row, "sum": value} for row, value in zip(rows, sums, strict=True)]
                write_shard(folder, shard, full, SCHEMA)
            bar.advance()
            if stop_requested():
                raise Interrupted(f"{shard + 1} of {num_shards} shards of {folder} are written.")


@torch.no_grad()
def _sums(trees: Sequence[Tree], batches: Sequence[Rows], function: Callable[[Rows], Tensor], job: Job) -> list[float]:
    with autocast(job):
        values = sequence_values(trees, (rows.to(job.device) for rows in batches), function)
    return [value for row in values for value in row]


def _has(folder: Path, shard: int, wanted: Sequence[dict[str, Any]]) -> bool:
    """Say whether a shard of an unfinished store is there and holds these rows."""
    if not has_shard(folder, shard):
        return False
    try:
        return _same(pq.read_table(shard_path(folder, shard)).to_pylist(), wanted)
    except (pa.ArrowInvalid, OSError):
        return False  # damaged: it is written again


def _same(rows: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> bool:
    found = [(row["id"], row["side"], row["key"]) for row in rows]
    return found == [(row["id"], row["side"], row["key"]) for row in wanted]
