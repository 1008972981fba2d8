"""What a service is made of: checks of its folder, what it writes, and how it measures.

Letters: N images, K classes.
"""

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postgrad import __version__
from postgrad.core.files import atomic_path, remove
from postgrad.core.layer_adapters import adapter_names, bake, drop, export_adapter
from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier
from postgrad.errors import ArtefactError
from postgrad.forgetting.base_record import mend_record, read_name
from postgrad.forgetting.certificate import write_certificate
from postgrad.forgetting.deletion import forget_note
from postgrad.forgetting.entries import ApplyBody, BaseBody, Body, Entry, digest
from postgrad.forgetting.erase import Erased, Material
from postgrad.forgetting.ledger import HEAD, Ledger, current_base, states, write_base
from postgrad.forgetting.metrics import accuracy
from postgrad.forgetting.policy import SINGLE
from postgrad.forgetting.request import ForgetRequest, read_request, write_request
from postgrad.forgetting.signature import VARIABLE, sign_file
from postgrad.forgetting.verification import hash_files
from postgrad.forgetting.views import View

PREFIX = "request-"
NUM_NOISE = 16
"""Images of noise that answers are compared on where no others are given."""


def adapter_name(request: str) -> str:
    """Name a request's adapter in the network: peft's names have no dots, and no two requests share one."""
    return PREFIX + request.replace("_", "__").replace(".", "_-")


def mend(folder: Path, entries: Sequence[Entry]) -> None:
    """Bring a service folder to what its ledger says: remove what has no entry, and what a killed writer left."""
    mend_record(folder, entries)
    forget_note(folder, entries)
    known, adapters = states(entries), folder / "adapters"
    for path in adapters.iterdir() if adapters.is_dir() else ():
        if path.name not in known:
            remove(path)
    for place in (folder, folder / "certificates"):
        for path in place.glob(".*.tmp"):
            remove(path)


def first_body(folder: Path, name: str, hashes: Mapping[str, str], classes: Sequence[str]) -> BaseBody:
    """Write base.json for a service that begins, and give the body of its first entry.

    Args: hashes: of the base's tensors by name. classes: none = it is a language model.
    """
    base = write_base(folder, name, hashes, classes)
    return BaseBody(
        name=name, base_hash=base.base_hash, record_hash=base.record_hash, num_tensors=len(hashes),
        num_classes=len(classes), code_version=__version__,
    )  # fmt: skip


def enter(ledger: Ledger, body: Body) -> Entry:
    """Add an entry, and sign the ledger's head anew where the environment has a key."""
    entry = ledger.append(body)
    sign(ledger.folder, HEAD)
    return entry


def check_base(folder: Path, entries: Sequence[Entry], hashes: Mapping[str, str], name: str) -> None:
    """Refuse a model that is not the base on record.

    Raises: ArtefactError: with both hashes.
    """
    found, expected = digest(dict(sorted(hashes.items()))), current_base(entries).base_hash
    if found != expected:
        raise ArtefactError(
            f"{folder} belongs to a base of hash {expected[:16]}, {read_name(folder)}; the model at hand, {name}, has "
            f"{found[:16]}. Give the service's base, or another service folder."
        )


def check_adapter(folder: Path, entries: Sequence[Entry], request: str) -> None:
    """Refuse an adapter that the ledger does not know like this.

    Raises: ArtefactError: no such request, one of another base, or other files.
    """
    bodies = [entry.body for entry in entries if isinstance(entry.body, ApplyBody) and entry.body.request == request]
    if not bodies:
        raise ArtefactError(f"no request {request!r} was applied; applied are {list(states(entries))}.")
    base_hash = current_base(entries).base_hash
    if bodies[-1].base_hash != base_hash:
        raise ArtefactError(
            f"the adapter of request {request!r} belongs to the base {bodies[-1].base_hash[:16]}, the one in use is "
            f"{base_hash[:16]}: its change would be made twice, or to another model."
        )
    place, expected = folder / "adapters" / request, bodies[-1].adapter_files
    found = hash_files(place)
    for file in sorted({**expected, **found}):
        if expected.get(file) != found.get(file):
            raise ArtefactError(
                f"{place / file}: expected {expected.get(file, 'no such file')}, the SHA-256 in the ledger, found "
                f"{found.get(file, 'no file')}. Restore it from a copy."
            )


def unchanged(hashes: Mapping[str, str], touched: Collection[str]) -> dict[str, str]:
    """List the base's tensors without those whose effect a request changed."""
    return {name: value for name, value in sorted(hashes.items()) if name not in touched}


def write_adapter(place: Path, network: nn.Module, request: ForgetRequest, base: str) -> None:
    """Write a request's folder: its adapter as peft does, and the request itself."""
    place.parent.mkdir(exist_ok=True)
    with atomic_path(place) as temporary:
        export_adapter(network, adapter_name(request.id), temporary, base=base)
        write_request(temporary / "request.json", request)
        remove(place)


def counts(num_changed: int, material: Material, erased: Erased) -> dict[str, float]:
    """Count what a request worked with, as its entry records it."""
    shots = torch.bincount(material.forget.labels)
    single = {} if material.levels is None else {SINGLE: float(len(material.forget))}
    return {
        "num_changed_blocks": float(num_changed), "num_earlier": float(material.task), "steps": float(erased.steps),
        "image_passes": erased.image_passes, "min_shots": float(shots[shots > 0].min()),
        "num_old_classes": float(len(material.old)), **single,
    }  # fmt: skip


def baked(classifier: Classifier, names: Sequence[str]) -> Classifier:
    """Copy a classifier with these adapters added to its weights, and without any other."""
    made = copy.deepcopy(classifier)
    for name in adapter_names(made.network):
        if name not in names:
            drop(made.network, name)
    bake(made.network, names)
    return made


def answers(classifier: Classifier, images: ImageSet) -> Float[Tensor, "N K"]:
    """Compute the logits of all images."""
    return View(classifier, images).see_all().logits


def noise(classifier: Classifier) -> ImageSet:
    """Draw images of noise that fit a classifier, always the same ones."""
    shape = (NUM_NOISE, max(1, classifier.channels), *classifier.size)
    drawn = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageSet(drawn, torch.zeros(NUM_NOISE, dtype=torch.int64), classifier.classes)
    return images.to(classifier.mean_of_channels.device)


def accuracies(
    logits: Float[Tensor, "N K"], images: ImageSet, groups: Mapping[str, Collection[int]]
) -> dict[str, float]:
    """Give the accuracy of each group of classes in per cent, with its interval; a group without images has none."""
    predicted = logits.argmax(1)
    found: dict[str, float] = {}
    for name, classes in groups.items():
        among = torch.isin(images.labels, images.labels.new_tensor(sorted(classes)))  # [N]
        if bool(among.any()):
            share = accuracy(predicted[among], images.labels[among])
            found |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    return found


def differences(before: Float[Tensor, "N K"], after: Float[Tensor, "N K"]) -> dict[str, float]:
    """Say how far two models' answers are apart."""
    same = (before.argmax(1) == after.argmax(1)).double().mean()
    return {"logit_difference": float((after - before).abs().max()), "same_answers": 100.0 * float(same)}


def carried_out(folder: Path, entries: Sequence[Entry], request: ForgetRequest) -> Entry | None:
    """Find the entry of this very request; its salt may be another.

    Raises: ArtefactError: another request has its id.
    """
    found = [e for e in entries if isinstance(e.body, ApplyBody) and e.body.request == request.id]
    known = read_request(folder / "adapters" / request.id / "request.json") if found else request
    if replace(known, salt=request.salt) != request:
        raise ArtefactError(
            f"request {request.id!r} was applied with other content: expected {known.classes or known.samples}, "
            f"found {request.classes or request.samples}. Give the new request an id of its own."
        )
    return found[-1] if found else None


def certify(folder: Path, entry: Entry, request: ForgetRequest, identical: Mapping[str, str]) -> None:
    """Write a request's certificate, and sign it."""
    path = write_certificate(folder, entry, request, identical)
    sign(path.parent, path.name)


def uncertified(folder: Path, entries: Sequence[Entry]) -> list[tuple[ApplyBody, Entry]]:
    """List the requests whose certificate a stopped process did not come to write.

    One of a base before cannot be made anew: the list of its tensors is gone.
    """
    now, pages = current_base(entries).base_hash, folder / "certificates"
    applied = [(each.body, each) for each in entries if isinstance(each.body, ApplyBody)]
    mine = [(body, each) for body, each in applied if body.base_hash == now]
    return [(body, each) for body, each in mine if not (pages / f"{body.request}.html").is_file()]


def sign(folder: Path, *names: str) -> None:
    """Sign files of a service anew where the environment has a key to sign with."""
    if os.environ.get(VARIABLE):
        for name in names:
            sign_file(folder / name)
