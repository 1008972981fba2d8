"""What the commands on a service share: the folder or a copy of it, its base, its images, and what a run did to it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from postgrad.core.files import atomic_path, write_json
from postgrad.core.runtime import Job
from postgrad.core.vision import ImagesConfig, ImageSet, load_images
from postgrad.core.vision_models import Classifier, ClassifierConfig, load_classifier
from postgrad.errors import ArtefactError, ConfigError, DataError
from postgrad.forgetting.base import BUILDERS
from postgrad.forgetting.base_record import read_classes
from postgrad.forgetting.entries import ApplyBody, Entry
from postgrad.forgetting.ledger import LEDGER, Ledger, states
from postgrad.forgetting.service_lock import hold

BEGUN = "begun.json"
SERVICE, BASE_MODEL = "runs/forget/service", "runs/forget/base/model"
"""Where `postgrad forget` leaves them."""


def check_service(folder: str, model: ClassifierConfig) -> None:
    """Refuse what cannot be a service, or its base.

    Raises: ConfigError: no ledger, or a model that is drawn anew each time.
    """
    check_folder(folder)
    if model.path in ("tiny", *BUILDERS):
        raise ConfigError(
            f"model.path: expected the service's trained base, found {model.path!r}, which is drawn anew. Give its "
            f"folder, such as {BASE_MODEL}."
        )


def check_folder(folder: str) -> None:
    """Refuse what cannot be a service.

    Raises: ConfigError: no ledger.
    """
    if not (Path(folder) / LEDGER).is_file():
        raise ConfigError(
            f"service: expected a service folder with {LEDGER}, found none in {folder!r}. `postgrad forget` makes one."
        )


def workplace(service: str, rehearse: bool, job: Job) -> Path:
    """Give the folder to work on: the service's own or, for a rehearsal, a copy in the run folder."""
    original, copy = Path(service), job.folder / "service"
    if not rehearse:
        return original
    if not copy.is_dir():
        let_go = hold(original)
        try:
            with atomic_path(copy) as temporary:
                shutil.copytree(original, temporary, ignore=shutil.ignore_patterns(".*"))
        finally:
            let_go()
    return copy


def entries_of_run(folder: Path, job: Job) -> list[Entry]:
    """Give the entries since this run began, which is noted in the run folder: what an earlier part of it has done."""
    note, entries = job.folder / BEGUN, Ledger.open(folder).entries()
    if not note.is_file():
        write_json(note, {"num_entries": len(entries)})
    begun = int(json.loads(note.read_bytes())["num_entries"])
    if begun > len(entries):
        raise ArtefactError(
            f"{folder}: expected {begun} entries or more, as when this run began, found {len(entries)}: it is another "
            "service now. Choose another runtime.folder."
        )
    return entries[begun:]


def in_use(entries: Sequence[Entry]) -> list[str]:
    """Name the requests in use, in order."""
    return [name for name, state in states(entries).items() if state in ("active", "frozen")]


def seed_of(entries: Sequence[Entry], request: str) -> int:
    """Give the seed of the run that applied a request: which images it held out depends on it."""
    bodies = [entry.body for entry in entries if isinstance(entry.body, ApplyBody) and entry.body.request == request]
    assert bodies, "only requests that were applied are asked for"
    return bodies[-1].seed


def load_base(model: ClassifierConfig, folder: Path, job: Job, images: ImageSet | None = None) -> Classifier:
    """Load the base of a service, with its classes in the order of its record.

    Args:   images: some that it is for; None = a saved model knows their shape.
    """
    channels, height, width = (1, 8, 8) if images is None else images.images.shape[1:]
    return load_classifier(model, read_classes(folder), (channels, height, width), job, builders=BUILDERS).eval()


class ServiceImages:
    """The images that a service's figures were measured on: which are test images may depend on the run's seed."""

    def __init__(self, config: ImagesConfig, folder: Path, job: Job) -> None:
        self._config, self._classes, self._job = config, read_classes(folder), job
        self._loaded: dict[int, tuple[ImageSet, ImageSet]] = {}

    def of(self, seed: int) -> ImageSet:
        """Load the test images of a run.

        Raises: DataError: there are none, or of other classes than the service's.
        """
        return self.both(seed)[1]

    def both(self, seed: int) -> tuple[ImageSet, ImageSet]:
        """Load the training and the test images of a run; raises as `of`."""
        if seed not in self._loaded:
            train, images = (part.to(self._job.device) for part in load_images(self._config, seed))
            if images.classes != self._classes or not len(images):
                raise DataError(
                    f"{self._config.path}: expected test images of the service's classes, {_few(self._classes)}; found "
                    f"{len(images)} of {_few(images.classes)}. Give the data that the service was made with."
                )
            self._loaded[seed] = train, images
        return self._loaded[seed]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
