"""Serve the same requests with other presets and with baselines: the paper's table, on the user's data."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from postgrad.core.layer_adapters import activate, adapter_names
from postgrad.core.runtime import Job, progress
from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier
from postgrad.errors import ConfigError
from postgrad.forgetting.baselines import BASELINES, run_baseline
from postgrad.forgetting.baselines_table import BaselineConfig
from postgrad.forgetting.erase import Material, erase
from postgrad.forgetting.erase_config import PRESETS
from postgrad.forgetting.leakage_audit import Audit
from postgrad.forgetting.request import ForgetRequest
from postgrad.forgetting.schedules import TaskSplit

SERVED = tuple(name for name in BASELINES if name not in ("gold", "retrain", "lwf_official"))
"""Baselines that begin at the trained model; gold is in the report already."""


@runtime_checkable
class Bench(Protocol):
    """What measures a model after a request."""

    @property
    def requests(self) -> Sequence[ForgetRequest]:
        """In order."""

    @property
    def splits(self) -> Sequence[TaskSplit]:
        """Which classes each request keeps, forgets, and finds forgotten."""

    def measure(self, name: str, classifier: Classifier, number: int) -> Audit:
        """Audit a classifier after a request."""


@dataclass(frozen=True)
class Served:
    """How another method did with all requests."""

    name: str
    audits: tuple[Audit, ...]


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of methods; "all" means every preset and baseline.

    Raises: ConfigError: no such method.
    """
    known = (*PRESETS, *SERVED)
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise ConfigError(f"baselines: expected names among {', '.join(known)}, or all; found {unknown}.")
    return known if "all" in names else tuple(dict.fromkeys(names))


def compare(
    names: Sequence[str],
    base: Classifier,
    bench: Bench,
    images: ImageSet,
    job: Job,
    settings: BaselineConfig = BaselineConfig(),
) -> list[Served]:
    """Serve every request with each method in turn, each from the base."""
    methods = chosen(names)
    found: list[Served] = []
    with progress(job, len(methods), "comparing") as bar:
        for name in methods:
            audits: list[Audit] = []
            model = copy.deepcopy(base)
            for number, split in enumerate(bench.splits):
                material = _material(images, split, number)
                part = replace(job, folder=job.folder / "compare" / name / str(number + 1))
                model = _serve(name, model, material, (number, settings), part)
                audits.append(bench.measure(name, model, number))
            found.append(Served(name, tuple(audits)))
            bar.advance()
    return found


def _material(images: ImageSet, split: TaskSplit, number: int) -> Material:
    return Material(images.of_classes(split.forget), images.of_classes(split.replayed), number, split.old)


def _serve(name: str, model: Classifier, material: Material, how: tuple[int, BaselineConfig], job: Job) -> Classifier:
    """Carry out one request."""
    number, settings = how
    job.folder.mkdir(parents=True, exist_ok=True)
    if name not in PRESETS:
        return run_baseline(name, model, material.forget, material.retain, settings, job)
    earlier = adapter_names(model.network)
    config = replace(PRESETS[name], floor=100.0)  # a table shows what a service would refuse
    erase(model, material, f"request-{number + 1}", earlier, config, job)
    activate(model.network, adapter_names(model.network))
    return model
