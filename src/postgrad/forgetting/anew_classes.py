"""A classifier's requests measured anew, revoked ones included."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import classifier_hash
from postgrad.forgetting.entries import ApplyBody, Entry
from postgrad.forgetting.metrics import acc_table
from postgrad.forgetting.request import manifest_hash
from postgrad.forgetting.sample_audit import Scope, audit_samples, rows_of, unseen_rows
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_parts import answers
from postgrad.forgetting.service_runs import ServiceImages
from postgrad.forgetting.views import passes

COMPARED = ("acc_r", "acc_f", "acc_h", "acc_o", "h", "acc_r_pretrained", "acc_f_pretrained", "acc_h_pretrained")
"""Figures that follow from the model and test images alone."""


class ClassesAnew:
    """The base of a classifier's service, and the images it is measured on; a `Subject`."""

    def __init__(self, service: Service, images: ServiceImages | None) -> None:
        self._service, self._images = service, images

    def hashes(self) -> dict[str, str]:
        """Hash each tensor of the base."""
        return classifier_hash(self._service.classifier)

    def classes(self) -> tuple[str, ...]:
        """Name the classes."""
        return self._service.classifier.classes

    def show(self, entry: Entry) -> None:
        """Answer as right after an entry."""
        self._service.show(self._service.in_use_at(entry))

    @torch.no_grad()
    def figures(self, entry: Entry) -> Mapping[str, float]:
        """Measure a request; nothing without images, or for single images that are gone."""
        body = entry.body
        assert isinstance(body, ApplyBody), "only requests that were applied are measured"
        if self._images is None:
            return {}
        split, (train, test) = self._service.split_at(entry), self._images.both(body.seed)
        row = self._whole(split, test) if split.forget else self._single(body, Scope(split), train, test)
        return {name: row[name] for name in COMPARED if name in row}

    def _whole(self, split: TaskSplit, test: ImageSet) -> Mapping[str, float]:
        """Measure with the adapters at hand and without any."""
        after = answers(self._service.classifier, test).argmax(1)
        self._service.show(())
        before = answers(self._service.classifier, test).argmax(1)
        return acc_table(test.labels, after, split, pretrained=before, start=before).row()

    def _single(self, body: ApplyBody, scope: Scope, train: ImageSet, test: ImageSet) -> Mapping[str, float]:
        """Measure single images, if all of them are still there."""
        asked = self._service.request(body.request)
        forget = train.select(rows_of(asked.samples, train))
        if manifest_hash(asked.salt, forget.hashes) != body.manifest_hash:
            return {}
        unseen = unseen_rows(test, forget.labels.tolist())[1]
        after = passes(self._service.classifier, (forget, test))
        self._service.show(())
        before = passes(self._service.classifier, (forget, test))
        whole = replace(scope, rows=tuple(range(len(forget))), unseen=unseen)
        return audit_samples("", after, before, None, whole).figures()
