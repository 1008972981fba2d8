"""A service that forgets on request: one folder with a ledger, an adapter a request, and certificates.

    service/base.json               the base model's name, its tensors' hashes, its classes
    service/ledger.jsonl, .head     what was done, each entry chained to the one before
    service/adapters/<request>/     a PEFT folder with the layers that carry it, and request.json
    service/certificates/<request>  JSON and a page to print

An entry in the ledger makes a change real: whatever stops a process, the folder is as before it or as after it once
opened again. An adapter without an entry is what a stopped process left, and is removed. The base is never written,
`bake` makes another. A process holds the folder from `open` to `close`, or to its end.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from postgrad import __version__
from postgrad.core.config import dump_config
from postgrad.core.distributed import first_rank
from postgrad.core.layer_adapters import activate, adapter_names, drop, import_adapter
from postgrad.core.runtime import Job
from postgrad.core.vision import ImageSet, few
from postgrad.core.vision_models import Classifier, classifier_hash, save_classifier
from postgrad.errors import ArtefactError, GateError
from postgrad.forgetting.base_record import install_record, prepare_record
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.deletion import purge_files
from postgrad.forgetting.entries import ApplyBody, BakeBody, Body, Entry, RevokeBody, digest
from postgrad.forgetting.erase import Erased, Material, erase
from postgrad.forgetting.erase_config import EraseConfig
from postgrad.forgetting.ledger import Ledger, current_base, states
from postgrad.forgetting.policy import PolicyConfig, policy_limits
from postgrad.forgetting.request import ForgetRequest, class_prints, manifest_hash, read_request, request_hash, resolve
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service_lock import hold
from postgrad.forgetting.service_parts import (
    PREFIX,
    accuracies,
    adapter_name,
    answers,
    baked,
    carried_out,
    certify,
    check_adapter,
    check_base,
    counts,
    differences,
    enter,
    first_body,
    mend,
    noise,
    uncertified,
    unchanged,
    write_adapter,
)
from postgrad.forgetting.verification import hash_files

Figures = Callable[[], Mapping[str, float]]


@dataclass(eq=False)
class Service:
    """A classifier, and the folder that says what it has forgotten."""

    folder: Path
    classifier: Classifier
    ledger: Ledger
    base_name: str
    _seen: str = ""
    """Hash of the last entry that this object knows of; "" = it only looks."""
    _let_go: Callable[[], object] = lambda: None

    @classmethod
    def open(cls, folder: Path, classifier: Classifier, base_name: str) -> "Service":
        """Begin a service, or go on with one: its adapters are put on the classifier, those revoked left out.

        Raises: ArtefactError: the folder belongs to another base, was altered, or another process works on it.
        """
        service = cls(folder, classifier, Ledger(folder), base_name)
        try:
            first_rank(service._begin)
            service._load()
        except BaseException:
            service.close()
            raise
        return service

    @classmethod
    def read(cls, folder: Path, classifier: Classifier, base_name: str) -> "Service":
        """Look at a service: nothing in its folder is held, mended or written, and no adapter is loaded unasked."""
        return cls(folder, classifier, Ledger(folder), base_name)

    def close(self) -> None:
        """Let other processes work on the folder."""
        self._let_go()

    def __enter__(self) -> "Service":
        """Use the service until the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the folder."""
        self.close()

    @property
    def active(self) -> tuple[str, ...]:
        """Name the requests in use, in order."""
        return self._in_state("active", "frozen")

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Name the requests in use and those that became part of the base."""
        return self._in_state("active", "frozen", "baked")

    def earlier(self, requests: Sequence[str]) -> tuple[str, ...]:
        """Name the requests in use that are none of these: of runs before."""
        return tuple(name for name in self.active if name not in requests)

    def applied(self, request: str) -> Entry | None:
        """Find the entry that applied a request."""
        found = [e for e in self.ledger.entries() if isinstance(e.body, ApplyBody) and e.body.request == request]
        return found[-1] if found else None

    def carried_out(self, request: ForgetRequest) -> Entry | None:
        """Find the entry of this very request; its salt may be another.

        Raises: ArtefactError: another request has its id.
        """
        return carried_out(self.folder, self.ledger.entries(), request)

    def request(self, name: str) -> ForgetRequest:
        """Read a request that was applied."""
        return read_request(self.folder / "adapters" / name / "request.json")

    def in_use_at(self, entry: Entry) -> tuple[str, ...]:
        """Name the requests that were in use right after an entry, in order."""
        found = states(self.ledger.entries()[: entry.index + 1])
        return tuple(name for name, state in found.items() if state in ("active", "frozen"))

    def split_at(self, entry: Entry) -> TaskSplit:
        """Say which classes the request of an entry kept, forgot, and found forgotten."""
        assert isinstance(entry.body, ApplyBody), "only a request that was applied splits the classes"
        before = states(self.ledger.entries()[: entry.index])
        old = self._labels(name for name, state in before.items() if state != "revoked")
        now = self._labels([entry.body.request])
        kept = set(range(len(self.classifier.classes))) - old - now
        return TaskSplit(tuple(sorted(kept)), tuple(sorted(now)), tuple(sorted(old - now)))

    def show(self, requests: Sequence[str]) -> None:
        """Have the classifier answer as with these requests in use, revoked ones too.

        Raises: ArtefactError: an adapter is not as it was recorded, or belongs to another base.
        """
        network = self.classifier.network
        for each in requests:
            if adapter_name(each) not in adapter_names(network):
                check_adapter(self.folder, self.ledger.entries(), each)
                import_adapter(network, self.folder / "adapters" / each, adapter_name(each))
        activate(network, [adapter_name(each) for each in requests])

    def material(self, request: ForgetRequest, images: ImageSet, missing: Sequence[int] = ()) -> Material:
        """Choose the images a request is learnt from; those of earlier requests, baked ones too, are left out.

        Args:   missing: classes to keep of which no image may be used.
        Raises: DataError: an unknown class or image, or one that was forgotten before.
        """
        earlier = [self.request(name) for name in self.forgotten]
        targets = resolve(request, images, earlier)
        forget, retain = images.select(list(targets.forget)), images.select(list(targets.retain))
        retain = retain.of_classes([label for label in targets.retained if label not in missing])
        if request.shots:
            forget, retain = few(forget, request.shots, 0), few(retain, request.shots, 0)
        return Material(forget, retain, len(earlier), tuple(sorted(self._labels(self.forgotten))))

    def apply(
        self, request: ForgetRequest, material: Material, configs: tuple[EraseConfig, PolicyConfig], job: Job,
        figures: Figures,
    ) -> Entry:  # fmt: skip
        """Carry out a request: train its adapter, measure, write it, enter it in the ledger, certify.

        Until the entry is written nothing has changed: a process stopped before goes on, or begins again.

        Args:   figures: measures the classifier once the adapter is on it.
        Raises: GateError: the request cannot be carried out within its floor; ArtefactError: its id was used before.
        """
        self._check_current()
        assert not request.samples or material.levels is not None, "single images are forgotten down to a level"
        if state := states(self.ledger.entries()).get(request.id):
            raise ArtefactError(
                f"request {request.id!r} was applied before and is {state}. Give the new request an id of its own."
            )
        self.show(self.active)
        network, name = self.classifier.network, adapter_name(request.id)
        place = self.folder / "adapters" / request.id
        earlier = [adapter_name(each) for each in self.active]
        try:
            erased = erase(self.classifier, material, name, earlier, configs[0], job)
            first_rank(lambda: write_adapter(place, self.classifier.network, request, self.base_name))
            # what is measured is what was written
            drop(network, name)
            import_adapter(network, place, name)
            activate(network, [*earlier, name])
            body, identical = self._body(request, material, erased, configs, job, figures())
            entry = self._enter(body)
        except Exception as error:
            self._load()
            if isinstance(error, GateError):
                raise GateError(f"request {request.id!r}: {error}") from error
            raise
        self._certify(entry, request, identical)
        return entry

    def revoke(self, request: str, images: ImageSet) -> Entry:
        """Take a request's adapter out of use, and check that the outputs are those of a model that never had it.

        Args:   images: to compare the outputs on, and to measure the classes concerned with.
        Raises: ArtefactError: the request is not in use.
        """
        self._check_current()
        if request not in self.active:
            state = states(self.ledger.entries()).get(request, "unknown")
            raise ArtefactError(f"request {request!r} is {state}, not in use; in use are {list(self.active)}.")
        network, left = self.classifier.network, [each for each in self.active if each != request]
        groups = self._groups([name for name in self.forgotten if name != request], [request])
        try:
            self.show(self.active)
            drop(network, adapter_name(request))
            self.show(left)
            now = answers(self.classifier, images)
            for each in left:
                drop(network, adapter_name(each))
            self.show(left)
            exact = torch.equal(now, answers(self.classifier, images))
            self._hashes()  # the base is what it was
            return self._enter(
                RevokeBody(
                    request=request, base_hash=current_base(self.ledger.entries()).base_hash, bit_exact=exact,
                    code_version=__version__, metrics=accuracies(now, images, groups),
                )
            )  # fmt: skip
        except Exception:
            self._load()
            raise

    def bake(self, folder: Path, load: Callable[[Path], Classifier], images: ImageSet | None = None) -> Entry:
        """Write a new base with all requests in use added to its weights; the service goes on from it.

        `classifier` is another one afterwards; the one given to `open` stays as it is. Before the ledger's entry the
        service knows nothing of the new base, after it nothing else.

        Args:   load: reads the folder back; what it gives is what is entered.  images: to compare the answers on;
                None = noise.
        Raises: ArtefactError: nothing is in use.
        """
        self._check_current()
        names, before = self.active, current_base(self.ledger.entries()).base_hash
        if not names:
            raise ArtefactError("no request is in use, so there is nothing to bake.")
        self.show(names)
        shown = noise(self.classifier) if images is None else images
        old = answers(self.classifier, shown)
        first_rank(lambda: save_classifier(baked(self.classifier, [adapter_name(name) for name in names]), folder))
        made = load(folder)
        new = answers(made, shown)
        metrics = differences(old, new)
        if images is not None:
            metrics |= accuracies(new, images, self._groups(self.forgotten))
        hashes = classifier_hash(made)
        base = first_rank(lambda: prepare_record(self.folder, str(folder), hashes, made.classes))
        entry = self._enter(
            BakeBody(
                requests=names, base_hash=before, new_base_hash=base.base_hash, record_hash=base.record_hash,
                num_tensors=len(hashes), metrics=metrics, code_version=__version__,
            )
        )  # fmt: skip
        self.classifier, self.base_name = made, str(folder)
        first_rank(lambda: install_record(self.folder, base))
        return entry

    def purge(self, request: str, files: Sequence[Path]) -> Entry:
        """Delete files that held a request's data, and enter how many; the same call goes on where one was stopped.

        Raises: ArtefactError: no such request, or purged before; DataError: a file that cannot be meant.
        """
        self._check_current()
        entry = first_rank(
            lambda: purge_files(
                self.folder, self.ledger.entries(), request, files, lambda body: enter(self.ledger, body)
            )
        )
        self._seen = entry.hash
        return entry

    def _in_state(self, *wanted: str) -> tuple[str, ...]:
        return tuple(name for name, state in states(self.ledger.entries()).items() if state in wanted)

    def _labels(self, requests: Iterable[str]) -> set[int]:
        """Find the classes that some requests name."""
        names = {name for each in requests for name in self.request(each).classes}
        return {label for label, name in enumerate(self.classifier.classes) if name in names}

    def _groups(self, forgotten: Iterable[str], back: Iterable[str] = ()) -> dict[str, set[int]]:
        """Group the classes: those that stay forgotten, those that come back, the others."""
        old, again = self._labels(forgotten), self._labels(back)
        every = set(range(len(self.classifier.classes)))
        return {"acc_r": every - old - again, "acc_o": old, "acc_back": again - old}

    def _begin(self) -> None:
        """Hold the folder, and begin its ledger where there is none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._let_go = weakref.finalize(self, hold(self.folder))
        if not self.ledger.entries():
            made = self.classifier
            enter(self.ledger, first_body(self.folder, self.base_name, classifier_hash(made), made.classes))

    def _load(self) -> None:
        """Bring folder and classifier to what the ledger says, whatever a stopped process or a failed call left."""
        hashes = self._hashes()
        entries, network = self.ledger.entries(), self.classifier.network
        first_rank(lambda: mend(self.folder, entries))
        for name in adapter_names(network):
            if name.startswith(PREFIX):
                drop(network, name)
        self.show(self.active)
        for body, entry in first_rank(lambda: uncertified(self.folder, entries)):
            self._certify(entry, self.request(body.request), unchanged(hashes, body.tensors))
        self._seen = entries[-1].hash

    def _check_current(self) -> None:
        if self.ledger.entries()[-1].hash != self._seen:
            raise ArtefactError(
                f"{self.folder}: the ledger has entries that this service does not know of, or the service was opened "
                "to read. Open it again."
            )

    def _enter(self, body: Body) -> Entry:
        """Add an entry; from then on the change is real."""
        entry = first_rank(lambda: enter(self.ledger, body))
        self._seen = entry.hash
        return entry

    def _hashes(self) -> dict[str, str]:
        """Hash the base's tensors, and see that they are those on record."""
        hashes = classifier_hash(self.classifier)
        check_base(self.folder, self.ledger.entries(), hashes, self.base_name)
        return hashes

    def _certify(self, entry: Entry, request: ForgetRequest, identical: Mapping[str, str]) -> None:
        first_rank(lambda: certify(self.folder, entry, request, identical))

    def _body(
        self, request: ForgetRequest, material: Material, erased: Erased, configs: tuple[EraseConfig, PolicyConfig],
        job: Job, metrics: Mapping[str, float],
    ) -> tuple[ApplyBody, dict[str, str]]:  # fmt: skip
        """Say what was done, and which tensors are as they were."""
        config, policy = configs
        tensors = tuple(f"{layer}.weight" for layer in erased.linears)
        identical = unchanged(self._hashes(), tensors)
        blocks = ffn_blocks(self.classifier.network, placement=config.placement)
        changed = tuple(block.name for block in blocks if set(block.linears) & set(erased.linears))
        figures = {**metrics, **counts(len(changed), material, erased)}
        body = ApplyBody(
            request=request.id, request_hash=request_hash(request), class_prints=class_prints(request),
            num_samples=len(request.samples), num_forget=len(material.forget), num_retain=len(material.retain),
            manifest_hash=manifest_hash(request.salt, material.forget.hashes),
            config_hash=digest(dump_config(config)), code_version=__version__, seed=job.seed,
            hardware=str(job.device), base_name=self.base_name,
            base_hash=current_base(self.ledger.entries()).base_hash, num_blocks=len(blocks), blocks=changed,
            tensors=tensors, num_identical=len(identical), identical_hash=digest(identical),
            adapter_files=hash_files(self.folder / "adapters" / request.id), metrics=figures,
            policy=policy_limits(policy),
        )  # fmt: skip
        return body, identical
