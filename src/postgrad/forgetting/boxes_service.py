"""A service of a detector: its base, the images that it is measured on, its requests undone and baked.

Ledger, adapters and certificates are those of `network_service`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postgrad.core.runtime import Job
from postgrad.forgetting.box_files import BoxesConfig, load_boxes
from postgrad.forgetting.boxes import BoxSet
from postgrad.forgetting.boxes_report import look
from postgrad.forgetting.detector import Detector, DetectorConfig, load_detector, save_detector
from postgrad.forgetting.entries import Entry
from postgrad.forgetting.network_service import NetworkService
from postgrad.forgetting.schedules import TaskSplit

NUM_NOISE, NOISE_SIDE = 2, 64
"""Images of noise on which answers are compared, and their height and width."""


def boxes_service(folder: Path, detector: Detector, base_name: str) -> NetworkService:
    """Make the service of a detector; `open` begins it or goes on with it."""
    return NetworkService(folder, detector.network, detector.classes, base_name, answers_to_noise)


@torch.no_grad()
def answers_to_noise(network: nn.Module) -> Float[Tensor, " N"]:
    """Compute what a detector makes of noise, always the same: all logits, then all boxes."""
    drawn = torch.randn(NUM_NOISE, 3, NOISE_SIDE, NOISE_SIDE, generator=torch.Generator().manual_seed(0))
    out = network.eval()(pixel_values=drawn.to(next(network.parameters()).device))
    return torch.cat([out.logits.flatten(), out.pred_boxes.flatten()])


def load_boxes_base(path: str, job: Job) -> Detector:
    """Load the base of a detector's service."""
    return load_detector(DetectorConfig(path=path), (), job)


class ServiceBoxes:
    """The test images that a service's figures were measured on: which they are may depend on the run's seed."""

    def __init__(self, config: BoxesConfig, classes: tuple[str, ...]) -> None:
        self._config, self._classes = config, classes
        self._loaded: dict[int, BoxSet] = {}

    def of(self, seed: int) -> BoxSet:
        """Load the test images of a run.

        Raises: DataError: there are none, or they show a class that the detector does not have.
        """
        if seed not in self._loaded:
            self._loaded[seed] = load_boxes(self._config, seed)[1].renamed(self._classes)
        return self._loaded[seed]


def all_but(service: NetworkService, now: tuple[int, ...], old: tuple[int, ...]) -> TaskSplit:
    """Split the detector's classes: those forgotten now and before, and all the others."""
    kept = tuple(label for label in range(len(service.classes)) if label not in (*now, *old))
    return TaskSplit(kept, now, tuple(label for label in old if label not in now))


def revoke_boxes(service: NetworkService, name: str, detector: Detector, boxes: BoxSet | None) -> Entry:
    """Take a request out of use; given images, AP of what comes back, of what is kept and of what stays forgotten."""

    def metrics() -> Mapping[str, float]:
        back = service.labels([name])
        gone = service.labels(each for each in service.forgotten if each != name)
        split = all_but(service, back, gone)
        groups = {"ap_r": split.remain, "ap_back": split.forget, "ap_o": split.old}
        return {} if boxes is None else look(detector, boxes).of_groups(groups)

    return service.revoke(name, metrics)


def bake_boxes(service: NetworkService, folder: Path, detector: Detector, boxes: BoxSet | None, job: Job) -> Entry:
    """Write a detector with all requests in use in its weights; transformers loads the folder. Nothing is undone."""

    def metrics(network: nn.Module) -> Mapping[str, float]:
        split = all_but(service, (), service.labels(service.forgotten))
        groups = {"ap_r": split.remain, "ap_o": split.old}
        return {} if boxes is None else look(replace(detector, network=network), boxes).of_groups(groups)

    def load() -> nn.Module:
        network: nn.Module = load_boxes_base(str(folder), job).network
        return network

    return service.bake(folder, lambda made: save_detector(replace(detector, network=made), folder), load, metrics)
