"""What every model of a run is measured with: the same images, attacks and references, request by request.

Letters: F images to forget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier
from postgrad.forgetting.leakage import Pass
from postgrad.forgetting.leakage_audit import Attacked, Audit, AuditConfig, Views, attack, audit
from postgrad.forgetting.relearn import Labelled, RelearnConfig, Relearned, choose_shots, relearn
from postgrad.forgetting.request import ForgetRequest, resolve
from postgrad.forgetting.sample_audit import Asked, SampleAudit, Scope, audit_samples, rows_of, unseen_rows
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.unseen import log_odds, unseen_levels
from postgrad.forgetting.views import View, passes

Outcome = Audit | SampleAudit
MOST_TESTED = 400
"""Forgotten test images that are asked for as they are learnt again."""


class Shown(NamedTuple):
    """What a model shows: its answers to all images, and how fast it learns forgotten classes again."""

    views: Views
    relearned: Relearned | None


class Reference(NamedTuple):
    """What the attacks of a request for classes find on a reference."""

    attacked: Attacked
    relearned: Relearned | None


def scopes_of(
    requests: Sequence[ForgetRequest],
    splits: Sequence[TaskSplit],
    images: tuple[ImageSet, ImageSet],
    earlier: Sequence[ForgetRequest] = (),
) -> list[Scope]:
    """Say of each request which images it is about.

    Args:   earlier: requests in use of runs before.
    Raises: DataError: single images that are not there, that were forgotten before, or that no test image is like.
    """
    train, test = images
    found: list[Scope] = []
    for number, (request, split) in enumerate(zip(requests, splits, strict=True)):
        before = (*earlier, *requests[:number])
        gone = rows_of((sample for each in before for sample in each.samples), train)
        if request.samples:
            rows = resolve(request, train, before).forget
            unseen = unseen_rows(test, train.labels[list(rows)].tolist())[1]
            found.append(Scope(split, rows, gone, unseen))
        else:
            found.append(Scope(split, (), gone))
    return found


def left(images: ImageSet, scope: Scope) -> ImageSet:
    """Take the training images that neither a request nor one before it has forgotten: what gold learns from."""
    kept = torch.isin(images.labels, images.labels.new_tensor(scope.split.remain))
    kept[[*scope.rows, *scope.gone]] = False
    return images.select(kept)


def beside(images: ImageSet, train: ImageSet, scope: Scope) -> ImageSet:
    """Add a request's single images to those that requests work with, where they are not among them."""
    known = set(images.hashes) if scope.rows else set()
    more = train.select([row for row in scope.rows if train.hashes[row] not in known])
    return ImageSet(torch.cat([images.images, more.images]), torch.cat([images.labels, more.labels]), images.classes)


def levels_for(classifier: Classifier, forget: ImageSet, test: ImageSet) -> Float[Tensor, " F"]:
    """Say down to which log odds each image is to be forgotten, as the model is; half of the test images say so."""
    unseen = test.select(unseen_rows(test, forget.labels.tolist())[0])
    mine, theirs = (log_odds(View(classifier, part).see_all().logits, part.labels) for part in (forget, unseen))
    return unseen_levels(mine, forget.labels, theirs, unseen.labels)


def relearned(
    model: Classifier, images: tuple[ImageSet, ImageSet], scope: Scope, config: RelearnConfig, seed: int
) -> Relearned | None:
    """Teach a copy of a model the forgotten classes again from a few images, among as many of kept ones.

    None: single images, which there is no class to be learnt of, or an attack of no steps.
    """
    train, test = images
    gone = scope.split.forget
    if not config.steps or not gone:
        return None
    counts = torch.bincount(train.labels, minlength=len(train.classes)).tolist()
    num = min(config.shots, *(counts[label] for label in gone))
    kept = [label for label in scope.split.replayed if counts[label]][: num * len(gone)]
    each = min(max(1, num * len(gone) // len(kept)), *(counts[label] for label in kept))
    picked = [choose_shots(train.labels, labels, shots, seed) for labels, shots in ((gone, num), (kept, each))]
    chosen, asked = torch.cat(picked), test.of_classes(gone)
    step = -(-len(asked) // MOST_TESTED)
    tested = Labelled(asked.images[::step], asked.labels[::step])
    return relearn(model, Labelled(train.images[chosen], train.labels[chosen]), tested, config, seed)


@dataclass(frozen=True, eq=False)
class Bench:
    """What every model of a run is measured with."""

    config: AuditConfig
    images: tuple[ImageSet, ImageSet]
    requests: Sequence[ForgetRequest]
    scopes: Sequence[Scope]
    original: Classifier
    """The model before any request of the run."""
    gold: Sequence[Shown]
    """Of each request; none = no gold."""
    seed: int

    @property
    def splits(self) -> list[TaskSplit]:
        """Say which classes each request keeps, forgets, and finds forgotten."""
        return [scope.split for scope in self.scopes]

    @cached_property
    def base(self) -> Views:
        """What the original model shows."""
        return passes(self.original, self.images)

    @cached_property
    def references(self) -> dict[int, tuple[Reference, Reference | None]]:
        """Attack the base and gold for each request for classes."""
        return {
            number: (
                self._attacked(self.base, self.relearn(self.original, number), number),
                self._attacked(*self.gold[number], number) if self.gold else None,
            )
            for number, scope in enumerate(self.scopes)
            if not scope.rows
        }

    def relearn(self, model: Classifier, number: int) -> Relearned | None:
        """Time how fast a model learns a request's classes again."""
        return relearned(model, self.images, self.scopes[number], self.config.relearn, self.seed)

    def outcome(self, name: str, classifier: Classifier, number: int) -> Outcome:
        """Audit a classifier after a request."""
        if self.scopes[number].rows:
            return self._single(name, passes(classifier, self.images), number)
        return self.measure(name, classifier, number)

    def measure(self, name: str, classifier: Classifier, number: int) -> Audit:
        """Audit a classifier after a request for classes."""
        views = passes(classifier, self.images)
        return self._whole(name, self._attacked(views, self.relearn(classifier, number), number), number)

    def references_of(self, audits: Sequence[Outcome]) -> tuple[list[Audit], list[Asked]]:
        """Audit base and gold beside the last request for classes, and beside each for single images."""
        names = ("base", "gold") if self.gold else ("base",)
        whole = [number for number, scope in enumerate(self.scopes) if not scope.rows][-1:]
        beside = [self.reference(name, number) for number in whole for name in names]
        single = [
            (request.id, [*(self.reference(name, number) for name in names), audit])
            for number, (request, audit) in enumerate(zip(self.requests, audits, strict=True))
            if self.scopes[number].rows
        ]
        return [each for each in beside if isinstance(each, Audit)], [
            (request, [each for each in some if isinstance(each, SampleAudit)]) for request, some in single
        ]

    def reference(self, name: str, number: int) -> Outcome:
        """Audit the base or gold."""
        if self.scopes[number].rows:
            return self._single(name, self.base if name == "base" else self.gold[number].views, number)
        found = self.references[number][name == "gold"]
        assert found is not None, "gold is asked for where it was trained"
        return self._whole(name, found, number)

    def _single(self, name: str, views: Views, number: int) -> SampleAudit:
        gold = self.gold[number].views if self.gold else None
        return audit_samples(name, views, self.base, gold, self.scopes[number])

    def _whole(self, name: str, found: Reference, number: int) -> Audit:
        base, gold = self.references[number]
        curves = None if found.relearned is None else (found.relearned, None if gold is None else gold.relearned)
        against = None if gold is None else gold.attacked
        return audit(name, found.attacked, base.attacked, against, self.scopes[number].split, relearned=curves)

    def _attacked(self, views: Views, curve: Relearned | None, number: int) -> Reference:
        """Attack a model whose training images without those that earlier requests forgot one by one are the bank."""
        scope = self.scopes[number]
        kept = torch.ones(len(views.train.labels), dtype=torch.bool)
        kept[list(scope.gone)] = False
        bank = Pass(*(part[kept] for part in (views.train.features, views.train.logits, views.train.labels)))
        return Reference(attack(Views(bank, views.test), scope.split, self.config), curve)
