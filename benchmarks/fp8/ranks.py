"""What one rank does to count bytes: python -m benchmarks.fp8.ranks ELEMENTS FOLDER, in torchrun's environment.

Bytes are counted at torch.distributed itself, apart from the package's own counter, which is reported beside them.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.fp8.reductions import draws, snr
from postgrad.core import distributed
from postgrad.fp8.collectives import Wire
from postgrad.fp8.numerics import dequantize
from postgrad.fp8.reduction import Mode, all_reduce
from postgrad.fp8.scaling_factor import ScalingFactor


class Counter:
    """Stands between a caller and torch.distributed, and counts what goes to other ranks.

    A rank's tensor goes to each of the others in a gather; all but its own share of a list goes out in an exchange; a
    sum or maximum, here of one number a tensor, counts once.
    """

    def __init__(self) -> None:
        self.sent = 0
        self._real = dist.all_reduce, dist.all_to_all_single, dist.all_gather

    def __enter__(self) -> "Counter":
        reduce, exchange, gather = self._real
        world, rank = dist.get_world_size(), dist.get_rank()

        def counted(real: Callable[..., Any], num: Callable[..., int]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                self.sent += num(*args)
                return real(*args, **named)

            return call

        def exchanged(out: Tensor, given: Tensor, received: list[int], sizes: list[int]) -> int:
            return given.nbytes - sizes[rank] * given.element_size()

        dist.all_reduce = counted(reduce, lambda tensor: tensor.nbytes)
        dist.all_to_all_single = counted(exchange, exchanged)
        dist.all_gather = counted(gather, lambda out, tensor: tensor.nbytes * (world - 1))
        return self

    def __exit__(self, *raised: object) -> None:
        dist.all_reduce, dist.all_to_all_single, dist.all_gather = self._real


def main(num: int, folder: Path) -> None:
    """Average one tensor both ways and write down what it took."""
    torch.set_num_threads(1)
    distributed.init_ranks(torch.device("cpu"))
    rank, world = distributed.rank(), distributed.world()
    ranks = draws(world, 0.0, num, 7, torch.device("cpu"))
    wire, found = Wire(), dict[str, Any]()
    modes: tuple[Mode, Mode] = ("native", "a2a")
    for mode in modes:
        factor = ScalingFactor(1) if mode == "native" else None
        with Counter() as counter:
            mean = all_reduce([ranks[rank]], mode=mode, factor=factor, wire=wire if mode == "a2a" else None)[0]
        found[mode] = counter.sent
    found["wire"] = wire.bytes_sent
    found["codes"] = hashlib.sha256(mean.codes.view(torch.uint8).numpy().tobytes()).hexdigest()
    found["snr"] = snr(torch.stack(ranks).double().mean(0), dequantize(mean))
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.destroy_ranks()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
