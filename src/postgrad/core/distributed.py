"""Ranks: joining them, sums over them, and what only the first of them does.

Every function is a plain call that also works with a single process, so callers never ask how many ranks
there are.
"""

import atexit
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from postgrad.errors import PostgradError

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20
"""Gradients travel in flat buckets of about this size; two are under way at a time."""

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: the first one may be writing or judging meanwhile."""


def init_ranks(device: torch.device) -> None:
    """Join the other ranks when torchrun started this process; do nothing otherwise or when already joined.

    The group is left at the end of the process and not before: stages run one after another in it.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    # gloo carries objects on the CPU in either case, so that a message never waits for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    atexit.register(destroy_ranks)


def destroy_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's place among the ranks, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    broadcast_object(None)


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return cast(T, box[0])


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, in the order of ranks."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value)
    return box


def first_rank(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only; every rank gets its result, or its error.

    Without this an error of rank 0 (a full disk, another run's folder) would leave the others waiting for
    ever.
    """
    if world() == 1:
        return action()
    result: T | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = action()
        except Exception as caught:
            error = caught
    told = error if isinstance(error, PostgradError | None) else PostgradError(f"rank 0 failed: {error!r}")
    result, told = broadcast_object((result, told))
    if error is not None:
        raise error
    if told is not None:
        raise told
    return cast(T, result)


def on_every_rank(action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it fails on one, all raise, so that none waits for ever."""
    if world() == 1:
        return action()
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    failed = [i for i, bad in enumerate(gather_objects(error is not None)) if bad]
    if error is not None:
        raise error
    if failed:
        raise PostgradError(f"Rank {failed[0]} failed, so this one stops too; its own message says why.")
    return cast(T, result)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add `tensor` over the ranks, in place, and return it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_parameters(params: Sequence[Parameter]) -> None:
    """Give every rank the first one's values."""
    if world() > 1:
        for param in params:
            dist.broadcast(param.data, src=0)


def all_reduce_gradients(params: Sequence[Parameter]) -> None:
    """Add the gradients over the ranks, in place, in flat buckets.

    A rank without a gradient for a parameter counts as zero; a parameter without one on any rank keeps none,
    so that the optimizer passes it by just as it does on a single rank.
    """
    if world() == 1:
        return
    under_way: deque[tuple[list[Parameter], Tensor, Any]] = deque()
    for bucket in _buckets(params):
        flat = _flatten(bucket)
        under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(under_way) == 2:
            _finish_bucket(*under_way.popleft())
    while under_way:
        _finish_bucket(*under_way.popleft())


def _buckets(params: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Split parameters, in order, into runs of one dtype and about `BUCKET_BYTES`."""
    bucket: list[Parameter] = []
    size = 0
    for param in params:
        if bucket and (size + param.nbytes > BUCKET_BYTES or param.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(param)
        size += param.nbytes
    if bucket:
        yield bucket


def _flatten(bucket: list[Parameter]) -> Tensor:
    """Lay a bucket's gradients end to end, then a number a parameter: 1 where this rank has a gradient."""
    pieces = [param.new_zeros(param.numel()) if param.grad is None else param.grad.reshape(-1) for param in bucket]
    present = [float(param.grad is not None) for param in bucket]
    return torch.cat([*pieces, torch.tensor(present, dtype=bucket[0].dtype, device=bucket[0].device)])


def _finish_bucket(bucket: list[Parameter], flat: Tensor, work: Any) -> None:
    """Wait for a bucket's sum and hand it back to its parameters."""
    work.wait()
    *sums, present = torch.split(flat, [*(param.numel() for param in bucket), len(bucket)])
    views = [piece.view(param.shape) for piece, param in zip(sums, bucket, strict=True)]
    own = [(param.grad, view) for param, view in zip(bucket, views, strict=True) if param.grad is not None]
    if own:
        torch._foreach_copy_([gradient for gradient, _ in own], [view for _, view in own])
    if len(own) == len(bucket):
        return
    # Only a rank that lacks a gradient has to look (on a GPU: wait) whether another rank had one.
    for param, view, count in zip(bucket, views, present.tolist(), strict=True):
        if param.grad is None and count > 0:
            param.grad = view.clone()
