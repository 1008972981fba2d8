"""What a detector still knows of the objects it was to forget, read from its decoder's embeddings.

The attacker knows where the objects are: each box asks the query whose own box lies nearest to it, whatever that query
is named. The bank is such embeddings of training objects of all classes with their true names; those of test objects
are looked up in it, by neighbours and by a linear probe. A detector that never saw the classes ("gold") tells them
apart to a degree, too: only the excess over it is a leak. Without gold there is none: it is left out, never 0.

Source:  the attacks are those on classifiers, forgetting/leakage.py.

Letters: F forgotten test objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from postgrad.core.metrics import Interval
from postgrad.errors import ConfigError
from postgrad.forgetting.boxes import BoxSet, drawn
from postgrad.forgetting.detection import nearest_queries
from postgrad.forgetting.detector import Detector
from postgrad.forgetting.leakage import Pass, fit_probe, knn_found, probe_found, recovery
from postgrad.forgetting.leakage_audit import spread

Attacked = Mapping[str, Bool[Tensor, " F"]]
"""Attack -> which forgotten test objects it recognises."""


@dataclass(frozen=True, kw_only=True)
class BoxAuditConfig:
    """How hard the leakage audit of a detector looks."""

    neighbours: int = 5
    """k of the nearest-neighbour attack."""
    penalty: float = 1.0
    """Penalty on the weights of the linear probe."""
    images: int = 1000
    """Training images that objects are learnt from, at most; 0 = all."""


class Seen(NamedTuple):
    """What a detector shows of objects."""

    bank: Pass
    """Of training images."""
    test: Pass


def check_box_audit(config: BoxAuditConfig) -> None:
    """Refuse an audit that looks at nothing."""
    if config.neighbours < 1 or config.penalty <= 0 or config.images < 0:
        raise ConfigError(
            "audit: expected neighbours of at least 1, a penalty above 0 and images of at least 0; found "
            f"{config.neighbours}, {config.penalty:g} and {config.images}."
        )


def see(detector: Detector, boxes: tuple[BoxSet, BoxSet], config: BoxAuditConfig, seed: int) -> Seen:
    """Have a detector look at training images, a draw of them where there are many, and at test images."""
    train, test = boxes
    few = sorted(drawn(train, config.images, seed, "audit")) if config.images else range(len(train))
    return Seen(objects(detector, train.select(few)), objects(detector, test))


def objects(detector: Detector, boxes: BoxSet) -> Pass:
    """Give the embedding and the logits of the query nearest to each box, image after image."""
    features, logits, labels = [], [], []
    for batch, found in detector.looks(boxes):
        for i, target in enumerate(batch.targets):
            queries = nearest_queries(found.boxes[i], target["boxes"])
            features.append(found.embeddings[i, queries])
            logits.append(found.logits[i, queries])
            labels.append(target["class_labels"])
    return Pass(torch.cat(features).cpu(), torch.cat(logits).cpu(), torch.cat(labels).cpu())


def attack(seen: Seen, forgotten: Sequence[int], config: BoxAuditConfig) -> Attacked:
    """Run every attack on one detector; none where the bank or the test images show no forgotten object."""
    bank, test = seen
    if not len(bank.of(forgotten).labels) or not len(test.of(forgotten).labels):
        return {}
    k, probe = min(config.neighbours, len(bank.labels)), fit_probe(bank.features, bank.labels, penalty=config.penalty)
    return {
        "knn": knn_found(bank, test, forgotten, k=k),
        "probe": probe_found(probe, test, forgotten),
        "knn_alone": knn_found(bank, test, forgotten, k=k, alone=True),
        "probe_alone": probe_found(probe, test, forgotten, alone=True),
    }


def leak_figures(after: Attacked, before: Attacked, gold: Attacked | None) -> dict[str, float]:
    """Name what was found, in per cent: by each attack, of the base, of gold, and the excess over gold."""
    figures: dict[str, float | Interval | None] = {}
    for name, found in after.items():
        mine, base = recovery(found, None if gold is None else gold[name]), recovery(before[name], None)
        figures |= {
            f"{name}_found": mine.share, f"{name}_pretrained": base.share, f"{name}_gold": mine.gold,
            f"{name}_excess": mine.excess,
        }  # fmt: skip
    return spread(figures)
