"""Algorithms over ranks, written once: as steps that ask for a collective and go on with its answer.

`run` gives the steps of this process what torch.distributed answers; `simulate` runs the steps of any number of ranks
in one process, so that what N ranks compute is told, to the bit, without N devices. Bytes travel as uint8, because gloo
refuses collectives of float8.

Letters: N ranks.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

R = TypeVar("R")

Kind = Literal["max", "sum", "exchange", "gather"]


class Ask(NamedTuple):
    """One collective, the same kind on every rank; its answer is a tensor.

    "max" and "sum" answer what they say, elementwise, in the tensor's own dtype. "exchange" sends each rank its piece,
    sizes[j] elements to rank j, and answers the pieces sent here, in the order of ranks. "gather" answers all ranks'
    tensors, sizes[j] elements of rank j, end to end.
    """

    kind: Kind
    tensor: Tensor
    sizes: Sequence[int] = ()


Steps = Generator[Ask, Tensor, R]
"""What one rank does between its collectives, and what it returns in the end."""


@dataclass
class Wire:
    """Counts what this rank hands to collectives for other ranks."""

    bytes_sent: int = 0

    def count(self, ask: Ask, rank: int, world: int) -> None:
        """Add one collective.

        A maximum, of one number a tensor, counts once; a sum counts as the ring that makes it, 2 (N - 1) / N.
        """
        total = ask.tensor.nbytes
        if ask.kind == "max":
            self.bytes_sent += total
        elif ask.kind == "sum":
            self.bytes_sent += 2 * total * (world - 1) // world
        elif ask.kind == "exchange":
            self.bytes_sent += total - ask.sizes[rank] * ask.tensor.element_size()
        else:
            self.bytes_sent += total * (world - 1)


def place(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return this process's rank in the group and the group's size; (0, 1) without a group to be in."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def run(steps: Steps[R], group: dist.ProcessGroup | None = None, wire: Wire | None = None) -> R:
    """Run this rank's steps over the group's collectives; every rank has to call it alike."""
    rank, world = place(group)
    ask, result = _advance(steps)
    while ask is not None:
        if wire is not None and world > 1:
            wire.count(ask, rank, world)
        ask, result = _advance(steps, _perform(ask, rank, group) if world > 1 else ask.tensor)
    return cast(R, result)


def over_ranks(
    kind: Literal["max", "sum"], numbers: Tensor, group: dist.ProcessGroup | None = None, wire: Wire | None = None
) -> Tensor:
    """Return the greatest or the sum of each number over the ranks; every rank has to call it."""

    def steps() -> Steps[Tensor]:
        return (yield Ask(kind, numbers))

    return run(steps(), group, wire)


def simulate(ranks: Sequence[Steps[R]]) -> list[R]:
    """Run the steps of many ranks in this process, in lock-step, and return what each of them would."""
    asks, results = zip(*(_advance(steps) for steps in ranks), strict=True)
    while asks[0] is not None:
        answers = _answers(cast(Sequence[Ask], asks))
        advanced = (_advance(steps, answer) for steps, answer in zip(ranks, answers, strict=True))
        asks, results = zip(*advanced, strict=True)
    assert not any(asks), "every rank asks for the same collectives"
    return [cast(R, result) for result in results]


def chain_sum(rows: Sequence[Tensor]) -> Tensor:
    """Add codes of float8 in order, with a rounding at every step, as a ring does; too large sums saturate."""
    dtype = rows[0].dtype
    largest = torch.finfo(dtype).max
    total = rows[0]
    for row in rows[1:]:
        total = (total.float() + row.float()).clamp(-largest, largest).to(dtype)
    return total


def _advance(steps: Steps[R], answer: Tensor | None = None) -> tuple[Ask | None, R | None]:
    """Go on to the next collective, or to the end and its result."""
    try:
        return (next(steps) if answer is None else steps.send(answer)), None
    except StopIteration as stop:
        return None, stop.value


def _perform(ask: Ask, rank: int, group: dist.ProcessGroup | None) -> Tensor:
    """Let torch.distributed answer."""
    tensor, sizes = ask.tensor, list(ask.sizes)
    if ask.kind in ("max", "sum"):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if ask.kind == "max" else dist.ReduceOp.SUM, group=group)
        return tensor
    if ask.kind == "exchange":
        out = tensor.new_empty(len(sizes) * sizes[rank])
        dist.all_to_all_single(out, tensor, [sizes[rank]] * len(sizes), sizes, group=group)
        return out
    out = tensor.new_empty(sum(sizes))
    pieces = torch.split(out, sizes)
    if len(set(sizes)) == 1:
        dist.all_gather(list(pieces), tensor, group=group)
        return out
    # Sizes differ: a broadcast a rank needs no padding, and every backend has it.
    pieces[rank].copy_(tensor)
    works = [dist.broadcast(x, group=group, async_op=True, group_src=i) for i, x in enumerate(pieces) if len(x)]
    for work in works:
        work.wait()
    return out


def _answers(asks: Sequence[Ask]) -> list[Tensor]:
    """Answer one collective of all ranks."""
    kind, tensors = asks[0].kind, [ask.tensor for ask in asks]
    if kind == "exchange":
        sent = [torch.split(ask.tensor, list(ask.sizes)) for ask in asks]
        return [torch.cat([pieces[rank] for pieces in sent]) for rank in range(len(asks))]
    if kind == "max":
        answer = torch.stack(tensors).amax(0)
    elif kind == "sum":
        answer = chain_sum(tensors)
    else:
        answer = torch.cat(tensors)
    return [answer.clone() for _ in asks]
