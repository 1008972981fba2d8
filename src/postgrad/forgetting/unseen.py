"""Forget single images: make the model no surer of them than it is of images of their class that it never saw.

A model that never saw an image may well name it rightly. So nothing is pushed to a wrong answer: each image's log odds
are lowered to a level taken from unseen images of its class, and no further, while retained images keep theirs.

Formula:   mean_i relu(m_i - M_i) + 3 mean_j relu(m'_j - m_j),   m = z_y - log sum_{k != y} exp z_k
           i images to forget, j retained ones, m' the log odds before, M_i the quantile of unseen images' log odds
           that has i's rank among the images to forget of its class.
Source:    none; GS-LoRA (arXiv 2403.11530) forgets whole classes. Log odds, near normal over models where the loss is
           not, are what the likelihood-ratio membership attack of Carlini et al. 2022 (arXiv 2112.03570) looks at.

Letters: F images to forget, N retained ones, U unseen ones, B batch, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from postgrad.core.numbers import full
from postgrad.core.vision import ImageSet
from postgrad.errors import DataError
from postgrad.forgetting.batches import Pair
from postgrad.forgetting.losses import Batch, ObjectiveConfig

HOLD = 3.0
"""Weight of keeping the retained images' log odds: without it the whole class sinks with the images to forget."""
MOST_ALPHA = 1e-4
"""Highest weight of the sparsity penalty."""
CLOSE = 0.05
"""Nats that images may lie above their levels, on average, when training stops early."""


def log_odds(logits: Float[Tensor, "B K"], labels: Int64[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return log(p / (1 - p)) of each image's own class; above 0 it has more than half of the probability."""
    values, at = full(logits), labels[:, None]
    return values.gather(1, at)[:, 0] - values.scatter(1, at, -torch.inf).logsumexp(1)


def unseen_levels(
    odds: Float[Tensor, " F"], labels: Int64[Tensor, " F"], unseen: Float[Tensor, " U"], others: Int64[Tensor, " U"]
) -> Float[Tensor, " F"]:
    """Give each image the log odds that an unseen image of its class and rank has: M.

    The surest of n images to forget of a class gets the quantile (n - 1/2) / n of the unseen ones, the next one
    (n - 3/2) / n, and so on: together they are then as unseen images are. A class without any takes those of all.

    Args:    others: labels of the unseen images.
    Raises:  DataError: there is no unseen image.
    """
    if not len(unseen):
        raise DataError(
            "Single images are forgotten down to the level of unseen ones; expected test images, found none."
        )
    levels = torch.empty_like(odds)
    for label in sorted({*labels.tolist()}):
        mine, theirs = labels == label, unseen[others == label]
        rank = odds[mine].argsort(stable=True).argsort()
        share = (rank + 0.5) / len(rank)
        levels[mine] = torch.quantile((theirs if len(theirs) else unseen).to(odds.dtype), share.to(odds.dtype))
    return levels


def halves(images: ImageSet) -> Bool[Tensor, " U"]:
    """Part images by the last digit of their hash: even ones (True) to take levels from, odd ones to measure with."""
    return torch.tensor([int(each[-1], 16) % 2 == 0 for each in images.hashes], dtype=torch.bool)


def plain(objective: ObjectiveConfig) -> ObjectiveConfig:
    """Leave the terms of an objective that push whole classes off, and lower alpha: single images pull less than it."""
    return replace(objective, beta=0.0, weight_forget=0.0, weight_retain=0.0, alpha=min(objective.alpha, MOST_ALPHA))


@dataclass(frozen=True, eq=False)
class UnseenTerms:
    """What a request for single images compares with."""

    levels: Float[Tensor, " F"]
    retained: Float[Tensor, " N"]
    """Log odds of the retained images before."""

    def losses(self, pair: Pair, gone: Batch, kept: Batch) -> Mapping[str, Tensor]:
        """Return both terms, weighted."""
        levels = self.levels[pair.forget.to(self.levels.device)]
        before = self.retained[pair.retain.to(self.retained.device)]
        return {
            "unseen": F.relu(log_odds(gone.logits, gone.labels) - levels).mean(),
            "hold": HOLD * F.relu(before - log_odds(kept.logits, kept.labels)).mean(),
        }

    def above(self, logits: Float[Tensor, "F K"], labels: Int64[Tensor, " F"]) -> float:
        """Return the mean nats by which the images to forget lie above their levels."""
        return F.relu(log_odds(logits, labels) - self.levels).mean().item()
