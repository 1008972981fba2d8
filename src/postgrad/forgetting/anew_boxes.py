"""A detector's requests measured anew, revoked ones included."""

from collections.abc import Mapping

from postgrad.core.layer_adapters import base_hashes
from postgrad.forgetting.boxes_report import Found, look, precisions
from postgrad.forgetting.boxes_service import ServiceBoxes
from postgrad.forgetting.detector import Detector
from postgrad.forgetting.entries import ApplyBody, Entry
from postgrad.forgetting.network_service import NetworkService


class BoxesAnew:
    """The base of a detector's service, and the test images it is measured on; a `Subject`."""

    def __init__(self, service: NetworkService, detector: Detector, images: ServiceBoxes | None) -> None:
        self._service, self._detector, self._images = service, detector, images
        self._before: dict[int, Found] = {}

    def hashes(self) -> dict[str, str]:
        """Hash each tensor of the base."""
        return base_hashes(self._service.network)

    def classes(self) -> tuple[str, ...]:
        """Name the classes."""
        return self._detector.classes

    def show(self, entry: Entry) -> None:
        """Answer as right after an entry."""
        self._service.show(self._service.in_use_at(entry))

    def figures(self, entry: Entry) -> Mapping[str, float]:
        """Measure a request; nothing without images."""
        body = entry.body
        assert isinstance(body, ApplyBody), "only requests that were applied are measured"
        if self._images is None:
            return {}
        test = self._images.of(body.seed)
        after = look(self._detector, test)
        if body.seed not in self._before:
            self._service.show(())
            self._before[body.seed] = look(self._detector, test)
        return precisions(self._before[body.seed], after, self._service.split_at(entry))
