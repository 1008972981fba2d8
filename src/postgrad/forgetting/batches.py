"""The order in which a request's images are seen: two streams, retained and forgotten, one batch of each a step.

Source: an epoch is one pass over the retained images; each step draws a batch to forget beside it, wrapping when
those are used up and beginning anew with every epoch, as in the official GS-LoRA engines.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from postgrad.core.batches import epoch_order
from postgrad.core.runtime import stage_seed


@dataclass(frozen=True)
class Pair:
    """One step's images, as places in the two sets."""

    retain: Int64[Tensor, " R"]
    forget: Int64[Tensor, " F"]


@dataclass(frozen=True)
class PairBatches:
    """Random access to the steps of a request's training; satisfies `core.loop.Batches`."""

    num_retain: int
    num_forget: int
    batch_size: int
    """Images of each set a step, over all ranks, which share them equally."""
    epochs: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch: one pass over the larger of few images, else over the retained ones."""
        longest = max(self.num_retain, self.num_forget) if self.num_retain < self.batch_size else self.num_retain
        return -(-longest // self.batch_size)

    def __len__(self) -> int:
        """Steps in all."""
        return self.epochs * self.epoch_steps

    def __getitem__(self, step: int) -> list[Pair]:
        """Make this rank's share of a step."""
        epoch, place = divmod(step, self.epoch_steps)
        retain = self._places("retain", self.num_retain, epoch, place)
        forget = self._places("forget", self.num_forget, epoch, place)
        return [Pair(retain[self.rank :: self.world], forget[self.rank :: self.world])]

    def _places(self, name: str, num: int, epoch: int, place: int) -> Tensor:
        """Slice an epoch's order; the last batch of a pass may be short, then the pass begins again."""
        order = torch.from_numpy(epoch_order(num, stage_seed(self.seed, name), epoch))
        first = place % -(-num // self.batch_size) * self.batch_size
        chosen = order[first : first + self.batch_size]
        lacking = -len(chosen) % self.world  # ranks take means of their shares, so these must be of one size
        return torch.cat([chosen, order.repeat(-(-lacking // num))[:lacking]])
