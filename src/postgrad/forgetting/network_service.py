"""A service that forgets, of any network: a ledger, an adapter a request, certificates.

Its folder is the one that `service` describes, with the files, entries and states of a classifier's service, so that
the ledger, the certificates and their checks are the same. What is particular to a network, its answers to something
fixed, comes from the caller.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from postgrad import __version__
from postgrad.core.distributed import first_rank
from postgrad.core.layer_adapters import activate, adapter_names, bake, base_hashes, drop, import_adapter, pairs
from postgrad.errors import ArtefactError
from postgrad.forgetting.base_record import install_record, prepare_record, read_classes
from postgrad.forgetting.blocks import Block
from postgrad.forgetting.entries import ApplyBody, BakeBody, Body, Entry, Finding, RevokeBody, digest
from postgrad.forgetting.ledger import Ledger, current_base, states
from postgrad.forgetting.policy import PolicyConfig, policy_limits
from postgrad.forgetting.request import ForgetRequest, class_prints, read_request, request_hash
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service_lock import hold
from postgrad.forgetting.service_parts import (
    PREFIX,
    adapter_name,
    carried_out,
    certify,
    check_adapter,
    check_base,
    enter,
    first_body,
    mend,
    uncertified,
    unchanged,
    write_adapter,
)
from postgrad.forgetting.verification import hash_files, verify_service


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What is entered of a request that was carried out."""

    blocks: Sequence[Block]
    """All that could have changed."""
    num_forget: int
    num_retain: int
    manifest_hash: str
    """Of the salted hashes of what was to be forgotten."""
    config: str
    seed: int
    hardware: str
    metrics: Mapping[str, float]
    policy: PolicyConfig


@dataclass(eq=False)
class NetworkService:
    """A network, and the folder that says what it has forgotten."""

    folder: Path
    network: nn.Module
    classes: tuple[str, ...]
    base_name: str
    answers: Callable[[nn.Module], Tensor]
    """What a network makes of something fixed, to compare bit for bit."""
    ledger: Ledger = field(init=False)
    _let_go: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        """Find the ledger."""
        self.ledger = Ledger(self.folder)

    def open(self) -> "NetworkService":
        """Begin the service, or go on with it; requests in use are shown.

        Raises: ArtefactError: the folder belongs to another base, was altered, or another process works on it.
        """
        try:
            first_rank(self._begin)
            self._mend()
            self.show(self.active)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Let other processes work on the folder."""
        self._let_go()

    def __enter__(self) -> "NetworkService":
        """Use the service until the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the folder."""
        self.close()

    @property
    def active(self) -> tuple[str, ...]:
        """Name the requests in use, in order."""
        return self._in_use(len(self.ledger.entries()))

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Name the requests in use and those that became part of the base."""
        found = states(self.ledger.entries())
        return tuple(name for name, state in found.items() if state != "revoked")

    def request(self, name: str) -> ForgetRequest:
        """Read a request that was applied."""
        return read_request(self.folder / "adapters" / name / "request.json")

    def labels(self, requests: Iterable[str]) -> tuple[int, ...]:
        """Find the classes that some requests have forgotten."""
        names = {name for each in requests for name in self.request(each).classes}
        return tuple(label for label, name in enumerate(self.classes) if name in names)

    def carried_out(self, request: ForgetRequest) -> ApplyBody | None:
        """Find what was entered of this very request; its salt may be another.

        Raises: ArtefactError: another request has its id.
        """
        entry = carried_out(self.folder, self.ledger.entries(), request)
        return entry.body if entry is not None and isinstance(entry.body, ApplyBody) else None

    def show(self, requests: Sequence[str]) -> None:
        """Have the network answer as with these requests in use, revoked ones too; others are taken off.

        Raises: ArtefactError: an adapter is not as it was recorded, or belongs to another base.
        """
        wanted = [adapter_name(each) for each in requests]
        for name in adapter_names(self.network):
            if name.startswith(PREFIX) and name not in wanted:
                drop(self.network, name)
        for each, name in zip(requests, wanted, strict=True):
            if name not in adapter_names(self.network):
                check_adapter(self.folder, self.ledger.entries(), each)
                import_adapter(self.network, self.folder / "adapters" / each, name)
        activate(self.network, wanted)

    def write(self, request: ForgetRequest) -> None:
        """Write the adapter trained for a request, and take it up from there: what is measured is what was written.

        Nothing has changed until `enter`.
        """
        name, place = adapter_name(request.id), self.folder / "adapters" / request.id
        first_rank(lambda: write_adapter(place, self.network, request, self.base_name))
        drop(self.network, name)
        import_adapter(self.network, place, name)
        activate(self.network, [*map(adapter_name, self.active), name])

    def enter(self, request: ForgetRequest, carried: Carried) -> Entry:
        """Enter a request whose adapter was written, and certify it: from then on it is in use."""
        adapted = set(pairs(self.network, adapter_name(request.id)))
        linears = [layer for block in carried.blocks for layer in block.linears if layer in adapted]
        changed = tuple(block.name for block in carried.blocks if adapted & set(block.linears))
        tensors = tuple(f"{layer}.weight" for layer in linears)
        identical = unchanged(self._hashes(), tensors)
        body = ApplyBody(
            request=request.id, request_hash=request_hash(request), class_prints=class_prints(request),
            num_samples=len(request.samples), num_forget=carried.num_forget, num_retain=carried.num_retain,
            manifest_hash=carried.manifest_hash, config_hash=digest(carried.config), code_version=__version__,
            seed=carried.seed, hardware=carried.hardware, base_name=self.base_name, base_hash=self._base_hash(),
            num_blocks=len(carried.blocks), blocks=changed, tensors=tensors, num_identical=len(identical),
            identical_hash=digest(identical), adapter_files=hash_files(self.folder / "adapters" / request.id),
            metrics={**carried.metrics, "num_changed_blocks": float(len(changed))},
            policy=policy_limits(carried.policy),
        )  # fmt: skip
        entry = self._add(body)
        self._certify(entry, request, identical)
        return entry

    def revoke(self, request: str, metrics: Callable[[], Mapping[str, float]]) -> Entry:
        """Take a request out of use, and check that the network answers as one that never had its adapter.

        Args:   metrics: measures the network without the request.
        Raises: ArtefactError: the request is not in use.
        """
        if request not in self.active:
            state = states(self.ledger.entries()).get(request, "unknown")
            raise ArtefactError(f"request {request!r} is {state}, not in use; in use are {list(self.active)}.")
        exact = self.undone(request)
        self._hashes()  # the base is what it was
        return self._add(
            RevokeBody(
                request=request, base_hash=self._base_hash(), bit_exact=exact, metrics=dict(metrics()),
                code_version=__version__,
            )
        )  # fmt: skip

    def undone(self, request: str) -> bool:
        """Say whether without a request the network answers, bit for bit, as one that never had its adapter."""
        left = [each for each in self.active if each != request]
        self.show(self.active)
        self.show(left)
        now = self.answers(self.network)
        self.show(())
        self.show(left)
        return torch.equal(now, self.answers(self.network))

    def bake(
        self, folder: Path, save: Callable[[nn.Module], object], load: Callable[[], nn.Module],
        metrics: Callable[[nn.Module], Mapping[str, float]],
    ) -> Entry:  # fmt: skip
        """Write a new base with all requests in use added to its weights; the service goes on from it.

        `network` is another one afterwards; the one given stays as it is. Before the ledger's entry the service knows
        nothing of the new base, after it nothing else.

        Args:   folder: where `save` writes and `load` reads.  metrics: measures what `load` gives.
        Raises: ArtefactError: nothing is in use.
        """
        names, before = self.active, self._base_hash()
        if not names:
            raise ArtefactError("no request is in use, so there is nothing to bake.")
        self._hashes()
        self.show(names)
        old = self.answers(self.network)
        made = copy.deepcopy(self.network)
        bake(made, [adapter_name(name) for name in names])
        first_rank(lambda: save(made))
        made = load()
        apart = float((self.answers(made) - old).abs().max())
        figures = {"largest_difference": apart, **metrics(made)}
        hashes = base_hashes(made)
        base = first_rank(lambda: prepare_record(self.folder, str(folder), hashes, self.classes))
        entry = self._add(
            BakeBody(
                requests=names, base_hash=before, new_base_hash=base.base_hash, record_hash=base.record_hash,
                num_tensors=len(hashes), metrics=figures, code_version=__version__,
            )
        )  # fmt: skip
        self.network, self.base_name = made, str(folder)
        first_rank(lambda: install_record(self.folder, base))
        return entry

    def findings(self) -> list[Finding]:
        """Check the whole folder against the ledger and the network at hand."""
        return first_rank(lambda: verify_service(self.folder, tensors=base_hashes(self.network)))

    def in_use_at(self, entry: Entry) -> tuple[str, ...]:
        """Name the requests that were in use right after an entry, in order."""
        return self._in_use(entry.index + 1)

    def split_at(self, entry: Entry) -> TaskSplit:
        """Say which classes the request of an entry kept, forgot, and found forgotten."""
        assert isinstance(entry.body, ApplyBody), "only a request that was applied splits the classes"
        before = states(self.ledger.entries()[: entry.index])
        old = self.labels(name for name, state in before.items() if state != "revoked")
        now = self.labels([entry.body.request])
        kept = tuple(label for label in range(len(self.classes)) if label not in (*old, *now))
        return TaskSplit(kept, now, old)

    def _in_use(self, num_entries: int) -> tuple[str, ...]:
        found = states(self.ledger.entries()[:num_entries])
        return tuple(name for name, state in found.items() if state in ("active", "frozen"))

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._let_go = weakref.finalize(self, hold(self.folder))
        if not self.ledger.entries():
            enter(self.ledger, first_body(self.folder, self.base_name, base_hashes(self.network), self.classes))

    def _mend(self) -> None:
        """Bring the folder to what the ledger says, whatever a stopped process left."""
        hashes, entries = self._hashes(), self.ledger.entries()
        first_rank(lambda: mend(self.folder, entries))
        if (found := read_classes(self.folder)) != self.classes:
            raise ArtefactError(
                f"{self.folder} belongs to a base of the classes {', '.join(found[:5])}, and so on; the model at hand, "
                f"{self.base_name}, has {', '.join(self.classes[:5])}. Give the service's base as it was, or another "
                "service folder."
            )
        for body, entry in first_rank(lambda: uncertified(self.folder, entries)):
            self._certify(entry, self.request(body.request), unchanged(hashes, body.tensors))

    def _add(self, body: Body) -> Entry:
        return first_rank(lambda: enter(self.ledger, body))

    def _base_hash(self) -> str:
        return current_base(self.ledger.entries()).base_hash

    def _hashes(self) -> dict[str, str]:
        """Hash the base's tensors, and see that they are those on record."""
        hashes = base_hashes(self.network)
        check_base(self.folder, self.ledger.entries(), hashes, self.base_name)
        return hashes

    def _certify(self, entry: Entry, request: ForgetRequest, identical: Mapping[str, str]) -> None:
        first_rank(lambda: certify(self.folder, entry, request, identical))
