"""A request to forget: what is to go, by whom it was asked, and what it would mean, before anything is trained.

A request is a JSON file. It names classes, or single images by the hash of their content. The person who asks appears
as a salted hash only; so do, outside this file, the classes and images. Keep the file as closely as the data.

    {"id": "2041", "classes": ["8"], "legal_basis": "GDPR Art. 17(1)(b)", "deadline": "2026-06-01"}

Letters: N images.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

from postgrad.core.config import load_config, nearest
from postgrad.core.files import write_json
from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.entries import HASH, REQUEST_ID, digest

SAMPLE_HASH = re.compile(r"[0-9a-f]{16}")
SALT = re.compile(r"[0-9a-f]{32,}")
NUM_NAMED = 5
"""Names that a message lists before it says "and so many more"."""


@dataclass(frozen=True, kw_only=True)
class ForgetRequest:
    """What is to be forgotten, and why."""

    id: str
    """Name of the request, and of its folder."""
    classes: tuple[str, ...] = ()
    """Names of classes to forget whole."""
    samples: tuple[str, ...] = ()
    """Content hashes of single images to forget."""
    reason: str = ""
    """Why, in words; it stays in this file."""
    legal_basis: str = ""
    """The right that is exercised, such as "GDPR Art. 17(1)(b)"; it is shown on the certificate."""
    requester_hash: str = ""
    """`fingerprint` of who asks, never the name."""
    deadline: str = ""
    """Day by which it must be done, such as 2026-06-01."""
    shots: int = 0
    """Images of each class to work with, forgotten and kept ones; 0 = all."""
    salt: str = ""
    """Secret of at least 32 hex digits, mixed into all hashes of names and images; `with_salt` draws one."""


@runtime_checkable
class Labelled(Protocol):
    """Images with their labels, as far as a request cares; a `core.vision.ImageSet` is one."""

    @property
    def labels(self) -> Int64[Tensor, " N"]:
        """Indices into classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names."""

    @property
    def hashes(self) -> tuple[str, ...]:
        """Content hashes, 16 hex digits."""


@dataclass(frozen=True)
class Targets:
    """A request, found in a data set: places in it, and indices of classes."""

    classes: tuple[int, ...]
    """Forgotten whole."""
    forget: tuple[int, ...]
    """Images to forget."""
    retain: tuple[int, ...]
    """Images to keep: of no request."""
    retained: tuple[int, ...]
    """Classes to keep, those without an image among them."""


@dataclass(frozen=True)
class Overlap:
    """What two requests both ask for."""

    request: str
    """The earlier one."""
    what: str


def read_request(path: Path) -> ForgetRequest:
    """Read a request strictly.

    Raises:  ConfigError: with file, key and, for an unknown key, the nearest name.
    """
    request = load_config(ForgetRequest, path, "request")
    try:
        check_request(request)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return request


def read_requests(paths: Iterable[Path]) -> list[ForgetRequest]:
    """Read requests in order.

    Raises:  ConfigError: one cannot be read, or two have one id.
    """
    found: dict[str, Path] = {}
    requests = []
    for path in paths:
        request = read_request(path)
        if request.id in found:
            raise ConfigError(f"{path}: id: '{request.id}' is that of {found[request.id]} too. Give each its own.")
        found[request.id] = path
        requests.append(request)
    return requests


def write_request(path: Path, request: ForgetRequest) -> None:
    """Write a request so that `read_request` gives an equal one."""
    check_request(request)
    write_json(path, asdict(request))


def check_request(request: ForgetRequest) -> None:
    """Refuse a request that cannot be meant.

    Raises:  ConfigError: with the key.
    """
    if not REQUEST_ID.fullmatch(request.id):
        raise ConfigError(f"id: expected letters, digits, '.', '_', '-', at most 64; found {request.id!r}.")
    if not request.classes and not request.samples:
        raise ConfigError("classes: expected classes or samples to forget, found neither. Name some.")
    for key, names in (("classes", request.classes), ("samples", request.samples)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{key}: {_listed(twice)} stands there twice. Name each once.")
    rules = (
        [("samples", SAMPLE_HASH, sample, "16 hex digits, a content hash") for sample in request.samples]
        + [("requester_hash", HASH, request.requester_hash, "64 hex digits: a fingerprint, never a name")]
        + [("salt", SALT, request.salt, "at least 32 hex digits")]
    )
    for key, rule, text, meaning in rules:
        if text and not rule.fullmatch(text):
            # What stands there may be a name: it is not repeated.
            raise ConfigError(f"{key}: expected {meaning}, found a text of {len(text)} characters that is none.")
    if request.shots < 0:
        raise ConfigError(f"shots: expected 0 (all) or more, found {request.shots}.")
    if request.deadline and not _is_day(request.deadline):
        raise ConfigError(f"deadline: expected a day such as 2026-06-01, found {request.deadline!r}.")


def with_salt(request: ForgetRequest) -> ForgetRequest:
    """Give a request without a salt one, drawn from the system's source of secrets."""
    return request if request.salt else replace(request, salt=secrets.token_hex(16))


def request_hash(request: ForgetRequest) -> str:
    """Hash a request: 64 hex digits, whatever the order of its classes and samples."""
    table = asdict(request)
    return digest({**table, "classes": sorted(request.classes), "samples": sorted(request.samples)})


def fingerprint(salt: str, text: str) -> str:
    """Hash a name with a secret salt, so that nobody without it can try names: HMAC-SHA-256, 64 hex digits.

    Raises:  ConfigError: there is no salt.
    """
    if not SALT.fullmatch(salt):
        raise ConfigError("salt: expected at least 32 hex digits, found none. Draw one with `with_salt`.")
    return hmac.new(bytes.fromhex(salt[: len(salt) // 2 * 2]), text.encode(), hashlib.sha256).hexdigest()


def class_prints(request: ForgetRequest) -> tuple[str, ...]:
    """Fingerprint the names of a request's classes, in order of the names."""
    return tuple(fingerprint(request.salt, f"class {name}") for name in sorted(request.classes))


def manifest_hash(salt: str, hashes: Iterable[str]) -> str:
    """Hash a set of images by the sorted, salted hashes of their contents."""
    return digest(sorted(fingerprint(salt, f"image {each}") for each in hashes))


def resolve(request: ForgetRequest, images: Labelled, earlier: Iterable[ForgetRequest] = ()) -> Targets:
    """Find a request in a data set.

    Args:    earlier: requests in use, whose data are neither forgotten again nor retained.
    Raises:  DataError: an unknown class or image, a class without images, nothing left to retain, or data that an
             earlier request has forgotten; with names.
    """
    earlier = tuple(earlier)
    targets = locate(request, images, earlier)
    for overlap in overlaps(request, images, earlier):
        raise DataError(
            f"request '{request.id}': {overlap.what} was asked for by request '{overlap.request}' already. Take it "
            "out of this one, or revoke the other first."
        )
    return targets


def locate(request: ForgetRequest, images: Labelled, earlier: Sequence[ForgetRequest] = ()) -> Targets:
    """Find a request as `resolve` does, but let it name what earlier requests have forgotten."""
    where, num = f"request '{request.id}'", len(images.hashes)
    labels = images.labels.tolist()
    for name in request.classes:
        _check_class(name, images.classes, where)
    chosen = _indices(request.classes, images.classes)
    if empty := [images.classes[label] for label in sorted(chosen - set(labels))]:
        raise DataError(f"{where}: no image of class {_listed(empty)} among {num}; nothing shows what to forget.")
    if unknown := sorted(set(request.samples) - set(images.hashes)):
        raise DataError(f"{where}: samples: no image with hash {_listed(unknown)} among {num}. Is it the same split?")
    gone = chosen.union(*(_indices(each.classes, images.classes) for each in earlier))
    samples = set(request.samples)
    gone_samples = samples.union(*(each.samples for each in earlier))
    pairs = list(enumerate(zip(labels, images.hashes, strict=True)))
    forget = tuple(i for i, (label, sample) in pairs if label in chosen or sample in samples)
    retain = tuple(i for i, (label, sample) in pairs if label not in gone and sample not in gone_samples)
    if not retain:
        raise DataError(f"{where}: nothing is left to retain of {num} images. Narrow the request or add other data.")
    retained = tuple(label for label in range(len(images.classes)) if label not in gone)
    return Targets(tuple(sorted(chosen)), forget, retain, retained)


def overlaps(request: ForgetRequest, images: Labelled, earlier: Iterable[ForgetRequest]) -> list[Overlap]:
    """List what a request names and earlier ones have forgotten: the same class, the same image, an image of a class.

    A class of which an earlier request named some images is no overlap: it may be forgotten whole.
    """
    label_of = dict(zip(images.hashes, images.labels.tolist(), strict=True))
    mine = _indices(request.classes, images.classes)
    found = []
    for other in earlier:
        theirs = _indices(other.classes, images.classes)
        found += [Overlap(other.id, f"class '{images.classes[label]}'") for label in sorted(mine & theirs)]
        within = [s for s in request.samples if s in other.samples or label_of.get(s) in theirs]
        found += [Overlap(other.id, f"image {sample}") for sample in within]
    return found


def _check_class(name: str, classes: Sequence[str], where: str) -> None:
    if name not in classes:
        guess = nearest(name, classes)
        hint = f"Nearest is '{guess}'." if guess else f"Known: {_listed(classes)}."
        raise DataError(f"{where}: classes: no class '{name}' among {len(classes)}. {hint}")


def _indices(names: Iterable[str], classes: Sequence[str]) -> set[int]:
    wanted = set(names)
    return {index for index, name in enumerate(classes) if name in wanted}


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _listed(names: Sequence[str]) -> str:
    """Name the first few and count the others."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:NUM_NAMED]) + more
