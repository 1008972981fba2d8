"""The images of a baseline's steps, and the random labels some of them give to what is forgotten.

Every micro-batch knows how many images its whole step has, so that means do not depend on how a step is split.

Letters: N images, R retained and F forgotten images of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from postgrad.core.runtime import stage_seed
from postgrad.errors import DataError
from postgrad.forgetting.batches import Pair, PairBatches

NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: places in the two sets, and the images of the whole step, over micro-batches and ranks."""

    retain: Int64[Tensor, " R"]
    forget: Int64[Tensor, " F"]
    num_retain: int
    num_forget: int

    def __len__(self) -> int:
        """Count the images."""
        return len(self.retain) + len(self.forget)

    @property
    def share(self) -> float:
        """The part of the step's images that are here."""
        return len(self) / (self.num_retain + self.num_forget)


@dataclass(frozen=True)
class Deal:
    """How a step is split: over ranks, then into micro-batches of at most so many images (0 = no limit)."""

    rank: int = 0
    world: int = 1
    micro_images: int = 0

    def __call__(self, retain: Int64[Tensor, " R"], forget: Int64[Tensor, " F"]) -> list[Batch]:
        """Give this rank's micro-batches; there may be none."""
        mine = [(0, int(place)) for place in retain[self.rank :: self.world]]
        mine += [(1, int(place)) for place in forget[self.rank :: self.world]]
        size = self.micro_images or max(1, len(mine))
        batches = []
        for first in range(0, len(mine), size):
            sides = [[place for side, place in mine[first : first + size] if side == which] for which in (0, 1)]
            kept, left = (torch.tensor(places, dtype=torch.int64) for places in sides)
            batches.append(Batch(kept, left, len(retain), len(forget)))
        return batches


@dataclass(frozen=True)
class Together:
    """A batch of retained images and one of those to forget in each step; satisfies `core.loop.Batches`."""

    pairs: PairBatches
    """Of all ranks together."""
    with_forget: bool
    deal: Deal

    def __len__(self) -> int:
        """Steps in all."""
        return len(self.pairs)

    def __getitem__(self, step: int) -> list[Batch]:
        """Make this rank's share of a step."""
        pair = _only(self.pairs[step])
        return self.deal(pair.retain, pair.forget if self.with_forget else NONE)


@dataclass(frozen=True)
class Alternating:
    """Steps on images to forget, or on retained ones, a pass after the other; satisfies `core.loop.Batches`.

    Each of the first `num_forgetting` epochs begins with a pass over the images to forget; every epoch has one over the
    retained images.
    """

    retain: PairBatches
    forget: PairBatches
    """Either gives its images as those to retain."""
    num_forgetting: int
    deal: Deal

    def __len__(self) -> int:
        """Steps in all."""
        return len(self.retain) + self.num_forgetting * self.forget.epoch_steps

    def __getitem__(self, step: int) -> list[Batch]:
        """Make this rank's share of a step."""
        both = self.retain.epoch_steps + self.forget.epoch_steps
        if step >= self.num_forgetting * both:
            return self.deal(_only(self.retain[step - self.num_forgetting * self.forget.epoch_steps]).retain, NONE)
        epoch, place = divmod(step, both)
        if place < self.forget.epoch_steps:
            return self.deal(NONE, _only(self.forget[epoch * self.forget.epoch_steps + place]).retain)
        place += epoch * self.retain.epoch_steps - self.forget.epoch_steps
        return self.deal(_only(self.retain[place]).retain, NONE)


def together(
    num_retain: int, num_forget: int, batch_size: int, epochs: int, *, seed: int, deal: Deal, with_forget: bool = True
) -> Together:
    """Batch both sets: an epoch is a pass over the retained images, beside which those to forget wrap around."""
    pairs = PairBatches(num_retain, num_forget if with_forget else 1, batch_size, epochs, seed)
    return Together(pairs, with_forget, deal)


def alternating(
    num_retain: int, num_forget: int, batch_size: int, epochs: int, *, seed: int, deal: Deal
) -> Alternating:
    """Batch the sets one after the other; the first half of the epochs forgets, too."""
    return Alternating(
        PairBatches(num_retain, 1, batch_size, epochs, stage_seed(seed, "alternating")),
        PairBatches(num_forget, 1, batch_size, epochs, stage_seed(seed, "alternating", "forget")),
        -(-epochs // 2),
        deal,
    )


def relabelled(labels: Int64[Tensor, " N"], allowed: Sequence[int], seed: int) -> Int64[Tensor, " N"]:
    """Draw another label for each, every allowed one but its own alike.

    Raises:  DataError: nothing but its own label is allowed for an image.
    """
    choices = torch.tensor(sorted(set(allowed)), dtype=torch.int64)
    own = (labels[:, None] == choices).int()  # [N, allowed]
    place = torch.where(own.any(1), own.argmax(1), len(choices))
    num = len(choices) - own.sum(1)
    if len(labels) and int(num.min()) < 1:
        raise DataError(f"expected a label other than an image's own to draw from, found only {choices.tolist()}.")
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.rand(len(labels), generator=generator, dtype=torch.float64) * num).long()
    return choices[drawn + (drawn >= place).long()]


def _only(pairs: list[Pair]) -> Pair:
    """Take the one share there is when there is one rank."""
    (pair,) = pairs
    return pair
