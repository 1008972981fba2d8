"""The leak terms of a request: weighted, measured against what the model made of the same images before.

Forgetting in the answers leaves a class's features in a heap of their own. These terms (core ideas and formulas in
forgetting/leakfree.py) move them among the retained images they look like, as in a model that never saw the class.

Letters: F forgotten images, N retained images, B batch, D width of the features, K classes, R directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from postgrad.core.vision_models import Seen
from postgrad.errors import ConfigError
from postgrad.forgetting.batches import Pair
from postgrad.forgetting.leakfree import (
    class_span,
    gold_proxy_logits,
    gold_proxy_loss,
    kept_loss,
    outside,
    probe_leak,
    scatter_targets,
    soft_knn_leak,
)
from postgrad.forgetting.losses import Batch

NEIGHBOURS = 5
"""Asked, when it is measured what neighbours find."""
LEAST_SPREAD = 1e-6
"""Of features that do not differ, such as those of a single retained image."""


@dataclass(frozen=True, kw_only=True)
class LeakConfig:
    """Weights of the terms that make of a model one that never saw the forgotten classes; 0 = off."""

    keep: float = 20.0
    """Answer retained images as the base would without the rows of forgotten classes."""
    softness: float = 2.0
    """By which the logits of that term are divided."""
    proxy: float = 1.0
    """Answer forgotten images so."""
    unseen: float = 5.0
    """The same where kept classes have no image: only forgotten ones still tell how those are answered."""
    scatter: float = 0.5
    """Move their features to those of retained images that are answered alike."""
    knn: float = 3.0
    """Lower the share of neighbours that tell the class."""
    probe: float = 0.0
    """Lower what a ridge regression finds of the classes."""
    compress: float = 0.0
    """Take the directions out of the features that do not tell retained classes apart."""
    temperature: float = 0.03
    """Cosine over which a neighbour's weight falls to a third: small asks for the very nearest."""
    stop: float = 60.0
    """With patience, training ends once neighbours find at most so many per cent of the forgotten training images."""


def check_leak(config: LeakConfig, name: str = "leak") -> None:
    """Refuse weights below 0, and a temperature that nothing can be divided by."""
    for key in ("keep", "proxy", "unseen", "scatter", "knn", "probe", "compress"):
        if vars(config)[key] < 0:
            raise ConfigError(f"{name}.{key}: expected a weight of 0 or more, found {vars(config)[key]}")
    for key in ("temperature", "softness"):
        if vars(config)[key] <= 0:
            raise ConfigError(f"{name}.{key}: expected above 0, found {vars(config)[key]}")


@dataclass(frozen=True, eq=False)
class LeakTerms:
    """What the terms compare with."""

    config: LeakConfig
    forgotten: tuple[int, ...]
    features: Float[Tensor, "F D"]
    """Of the forgotten images, before."""
    teacher: tuple[Float[Tensor, "F K"], Float[Tensor, "N K"]]
    """The base's logits of forgotten and of retained images."""
    targets: Float[Tensor, "F D"]
    """Features of retained images for them to land on."""
    spread: Float[Tensor, ""]
    """Mean variance of a retained feature: distances are counted in it."""
    span: Float[Tensor, "R D"]
    """Directions that tell the retained classes apart, before."""
    beyond: Float[Tensor, ""]
    """Variance in all others, before."""

    @property
    def on(self) -> bool:
        """Say whether any term acts on forgotten images."""
        config = self.config
        return any(each > 0 for each in (config.proxy, config.scatter, config.knn, config.probe, config.compress))

    def found(self, forget: Seen, labels: Int64[Tensor, " F"], retain: Seen, others: Int64[Tensor, " N"]) -> float:
        """Return the per cent of forgotten images whose nearest neighbours, without themselves, tell the class."""
        features = F.normalize(torch.cat([forget.features, retain.features]), dim=1)
        similar = features[: len(labels)] @ features.T
        similar.fill_diagonal_(-2.0)
        asked = min(NEIGHBOURS, len(features) - 1)
        near = torch.cat([labels, others])[similar.topk(asked).indices]  # [F, asked]
        return 100.0 * (near.mode(1).values == labels).float().mean().item()

    def losses(self, pair: Pair, gone: Batch, kept: Batch) -> Mapping[str, Tensor]:
        """Return each term that is on, times its weight."""
        teacher, retained = self.teacher
        index, others = pair.forget.to(teacher.device), pair.retain.to(teacher.device)
        found: dict[str, Tensor] = {}
        if self.config.keep:
            told = kept_loss(kept.logits, retained[others], self.forgotten, self.config.softness)
            found["keep"] = self.config.keep * told
        if self.config.proxy:
            found["leak_proxy"] = self.config.proxy * gold_proxy_loss(gone.logits, teacher[index], self.forgotten)
        if self.config.scatter:
            away = (gone.features - self.targets[index]).square().mean() / self.spread
            found["leak_scatter"] = self.config.scatter * away
        if self.config.knn:
            share = soft_knn_leak(gone.features, gone.labels, kept.features, kept.labels, self.config.temperature)
            found["leak_knn"] = self.config.knn * share
        if self.config.probe:
            features, labels = torch.cat([gone.features, kept.features]), torch.cat([gone.labels, kept.labels])
            found["leak_probe"] = self.config.probe * probe_leak(features, labels, self.forgotten)
        if self.config.compress:
            beyond = outside(torch.cat([gone.features, kept.features]), self.span) / self.beyond
            found["leak_compress"] = self.config.compress * beyond
        return found


def leak_terms(
    config: LeakConfig,
    before: tuple[Seen, Seen],
    labels: tuple[Int64[Tensor, " F"], Int64[Tensor, " N"]],
    base: tuple[Seen, Seen],
    old: Sequence[int] = (),
) -> LeakTerms:
    """Take note of what the model makes of the images before the request.

    Args: before, labels: of the forgotten and of the retained images.   base: what it made of them before any request.
          old: classes that were forgotten before; no image is answered as one.
    """
    forget, retain = before
    forgotten = tuple(sorted({*labels[0].tolist(), *old}))
    keys, bank = (gold_proxy_logits(seen.logits, forgotten).softmax(1).sqrt() for seen in before)
    targets = scatter_targets(keys, bank, retain.features)
    spread = retain.features.var(0, unbiased=False).mean().clamp(min=LEAST_SPREAD)
    # Singular values of many classes take their time: only where they are asked for, else no direction.
    span = class_span(retain.features, labels[1]) if config.compress else retain.features[:0]
    beyond = outside(torch.cat([forget.features, retain.features]), span).clamp(min=LEAST_SPREAD)
    teacher = (base[0].logits, base[1].logits)
    return LeakTerms(config, forgotten, forget.features, teacher, targets, spread, span, beyond)
