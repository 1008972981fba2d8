"""Texts to tokens: what a language model is trained on.

Texts become tokens once. They lie in the run folder, one file a split, mapped into memory, beside a manifest that
says which texts and which tokenizer they are of; a run that goes on finds them there. Documents follow one another,
each closed by the end-of-sequence token; core/blocks.py cuts that stream into blocks.
"""

import hashlib
import json
import math
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from postgrad.core.blocks import Stream
from postgrad.core.config import DataConfig
from postgrad.core.distributed import first_rank
from postgrad.core.files import atomic_path, write_json
from postgrad.core.runtime import Job, progress, stage_seed
from postgrad.core.tables import load_table
from postgrad.errors import ArtefactError, DataError, TemplateError

Document = str | Path
"""A text, or the file that holds it."""
TEXTS = (".txt", ".md")
TABLES = (".jsonl", ".json", ".parquet", ".csv")
HELD_OUT = ("validation", "valid", "val", "dev")
"""Names of a split that is set aside for evaluation."""
TRAIN, VALIDATION = "train", "validation"
FORMAT = "postgrad tokens 1"
MANIFEST = "tokens.json"
PIECE = 2**18
"""Characters a tokenizer sees at a time; longer documents are cut at the end of a line."""
CHUNK = 2**20
"""Characters tokenised in one call; bounds memory."""


@dataclass(frozen=True)
class Corpus:
    """What is trained on and what is set aside; that may be empty."""

    train: Stream
    held: Stream


def load_corpus(config: DataConfig, column: str, tokenizer: PreTrainedTokenizerBase, job: Job) -> Corpus:
    """Find the tokens in the run folder, or make them.

    Held out is the data's own validation split; where it has none, a share of the documents by a hash of their text,
    of a single document its end. `data.path` may also be a folder of tokens made before, or the run folder that has
    one; it is taken as it is.

    Args:    column: of a table, the one that holds the text.
    Raises:  DataError: nothing there, not readable, no text in it.
             ArtefactError: the text is not what this run began with.
             TemplateError: the tokenizer has no end-of-sequence token.
    """
    for made in (Path(config.path) / "tokens", Path(config.path)) if config.path else ():
        if (made / MANIFEST).is_file():
            return open_corpus(made, tokenizer)
    folder = job.folder / "tokens"
    first_rank(lambda: _prepare(folder, config, column, tokenizer, job))
    return open_corpus(folder, tokenizer)


def open_corpus(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Map the tokens of a folder into memory.

    Raises:  ArtefactError: they are damaged, or another tokenizer's.
    """
    manifest = _read_manifest(folder)
    if manifest["settings"]["tokenizer"] != tokenizer_hash(tokenizer):
        raise ArtefactError(
            f"{folder}: expected tokens of the model's tokenizer, found another's. Give data.path the text itself."
        )
    return Corpus(*(_open(folder, name, manifest) for name in (TRAIN, VALIDATION)))


def list_documents(config: DataConfig, column: str) -> tuple[list[Document], list[Document]]:
    """List the documents to train on and those of the data's own validation split, if it has one.

    A text file is one document, so is each .txt and .md file of a folder; where these are in folders `train` and
    `validation`, or are called so, those are the splits. A table has a document a row; its splits are files as
    `load_table` takes them, or named in a column `split`. "" stands for source files of Python's own library.
    """
    place = Path(config.path).expanduser()
    if not config.path:
        train, held = _library(), list[Document]()
    elif place.is_dir() and (files := _text_files(place)):
        train, held = _split_files(files, place, config.split)
    elif place.is_file() and place.suffix not in TABLES:
        train, held = [place], []
    else:
        train, held = _rows(config, column)
    if not train:
        raise DataError(f"{config.path}: expected texts to train on, found none of split {config.split!r}")
    return train[: config.limit or None], held


def read_document(document: Document) -> str:
    """Give a document's text.

    Raises:  DataError: the file is not readable, or not UTF-8.
    """
    if isinstance(document, str):
        return document
    try:
        return document.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{document}: expected UTF-8 text, found byte {error.start} that is not. Convert it."
        ) from error
    except OSError as error:
        raise DataError(f"{document}: expected a text file: {error.strerror}.") from error


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that decides which tokens a text becomes; 16 hex digits."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        told = tokenizer.backend_tokenizer.to_str()
    else:
        told = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{told}\n{tokenizer.eos_token_id}".encode()).hexdigest()[:16]


def _library() -> list[Document]:
    """List every second module of the running Python's library: some 2 MB of real text that is always there."""
    return [*sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::2]]


def _text_files(folder: Path) -> list[Path]:
    """List the text files below a folder; none where it is a store of rows."""
    return sorted(path for path in folder.rglob("*") if path.suffix in TEXTS and path.is_file())


def _split_files(files: Sequence[Path], folder: Path, split: str) -> tuple[list[Document], list[Document]]:
    """Sort files by the split that their first folder, or they themselves, are called after."""
    names = [Path(path.relative_to(folder).parts[0]).stem for path in files]
    held: list[Document] = [path for path, name in zip(files, names, strict=True) if name in HELD_OUT]
    own: list[Document] = [path for path, name in zip(files, names, strict=True) if name == split]
    return own or [path for path in files if path not in held], held


def _rows(config: DataConfig, column: str) -> tuple[list[Document], list[Document]]:
    """Read the texts of a table, and those of its validation split."""
    limit = 0 if Path(config.path).exists() else config.limit
    rows = load_table(config.path, config.split, limit)
    if all(isinstance(row.get("split"), str) for row in rows):
        parts = [[row for row in rows if row["split"] in names] for names in ([config.split], HELD_OUT)]
    else:
        parts = [rows, _held_rows(config.path)]
    train, held = ([text for row in part if (text := _text(row, column, config.path))] for part in parts)
    return [*train], [*held]


def _held_rows(path: str) -> list[dict[str, Any]]:
    """Read a table's validation split; none where it has none of its own."""
    place = Path(path)
    if place.is_file() or (place.is_dir() and not (place / "dataset_dict.json").is_file() and not _named(place)):
        return []
    for name in HELD_OUT:
        try:
            return load_table(path, name)
        except DataError:  # no such split
            continue
    return []


def _named(folder: Path) -> bool:
    """Say whether parquet files are called after a validation split."""
    words = [file.stem.replace("_", "-").replace(".", "-").split("-") for file in folder.glob("*.parquet")]
    return any(name in parts for parts in words for name in HELD_OUT)


def _text(row: Mapping[str, Any], column: str, path: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = f"no such column among {', '.join(row)}" if column not in row else f"{type(value).__name__}"
        raise DataError(f"{path}: expected text in column {column!r}, found {found}. Set text_column.")
    return value


def _prepare(folder: Path, config: DataConfig, column: str, tokenizer: PreTrainedTokenizerBase, job: Job) -> None:
    """Write the tokens of both splits, unless they are there and of this very text."""
    if tokenizer.eos_token_id is None:
        raise TemplateError(
            "expected a tokenizer with an end-of-sequence token, which tells documents apart, found none. Set "
            "eos_token in its tokenizer_config.json."
        )
    train, held = list_documents(config, column)
    digests = [_digest(document) for document in train]
    whole = hashlib.sha256(b"".join([*digests, b"held out", *map(_digest, held)])).hexdigest()[:16]
    share = 0.0 if held else config.held_out
    settings = {"text": whole, "tokenizer": tokenizer_hash(tokenizer), "held_out": share, "seed": job.seed}
    if _is_whole(folder, settings):
        return
    if any(job.folder.rglob("checkpoints/step-*")):  # its own, or those of runs below it
        raise ArtefactError(
            f"{folder}: expected the text that this run was trained on so far, found another: {config.path or 'the '}"
            f"{'' if config.path else 'library of Python'} has changed. Bring it back as it was, or choose another "
            "runtime.folder."
        )
    if share:
        train, held = _hold_out(train, digests, share, job.seed)
    sizes = [sum(_size(document) for document in part) for part in (train, held)]
    with progress(job, sum(sizes), "tokenise") as bar:
        parts = {
            name: _write(folder / f"{name}.bin", documents, tokenizer, bar)
            for name, documents in ((TRAIN, train), (VALIDATION, held))
        }
    write_json(folder / MANIFEST, {"format": FORMAT, "settings": settings, "splits": parts})


def _hold_out(
    documents: list[Document], digests: Sequence[bytes], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Set aside the documents whose hash comes first, one at least; of a single one, its end."""
    if len(documents) == 1:
        text = read_document(documents[0])
        border = math.ceil(len(text) * (1 - share))
        line = text.find("\n", max(0, border - 1), border + PIECE) + 1
        border = line if 0 < line < len(text) else border
        return [text[:border]], [text[border:]]
    places = [stage_seed(seed, "held out", digest.hex()) for digest in digests]
    num = min(len(documents) - 1, max(1, round(share * len(documents))))
    chosen = set(sorted(range(len(documents)), key=lambda i: (places[i], i))[:num])
    return (
        [document for i, document in enumerate(documents) if i not in chosen],
        [document for i, document in enumerate(documents) if i in chosen],
    )


def _digest(document: Document) -> bytes:
    text = read_document(document)
    try:
        return hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError as error:
        raise DataError(
            f"expected text that UTF-8 can say, found half a surrogate pair in {text[:60]!r}. Mend the row."
        ) from error


def _size(document: Document) -> int:
    return len(document.encode()) if isinstance(document, str) else document.stat().st_size


def _write(
    path: Path, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, bar: progress
) -> dict[str, int | str]:
    """Tokenise documents, chunk by chunk, into a file; describe it."""
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    digest, num_tokens, num_bytes = hashlib.sha256(), 0, 0
    with atomic_path(path) as temporary, _as_plain_text(tokenizer), temporary.open("wb") as file:
        for pieces in _chunks(documents):
            texts = [text for text, _ in pieces]
            ids = _encode(tokenizer, texts)
            ends = [[tokenizer.eos_token_id] if ends else [] for _, ends in pieces]
            data = np.concatenate(
                [np.asarray(part, dtype) for pair in zip(ids, ends, strict=True) for part in pair]
            ).tobytes()
            file.write(data)
            digest.update(data)
            num_tokens += len(data) // dtype.itemsize
            size = sum(len(text.encode()) for text in texts)
            num_bytes += size
            bar.advance(size)
    told: dict[str, int | str] = {"documents": len(documents), "tokens": num_tokens, "bytes": num_bytes}
    return told | {"dtype": dtype.str, "sha256": digest.hexdigest()}


def _chunks(documents: Sequence[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Cut documents into pieces, each with whether its document ends there, and gather them to chunks."""
    chunk: list[tuple[str, bool]] = []
    num_chars = 0
    for document in documents:
        text, at = read_document(document), 0
        while at == 0 or at < len(text):
            end = len(text) if len(text) - at <= PIECE else text.rfind("\n", at, at + PIECE) + 1 or at + PIECE
            chunk.append((text[at:end], end == len(text)))
            num_chars += end - at
            at = max(end, 1)
            if num_chars >= CHUNK:
                yield chunk
                chunk, num_chars = [], 0
    if chunk:
        yield chunk


@contextmanager
def _as_plain_text(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Have a text that spells a special token become the letters it is made of."""
    if not tokenizer.is_fast:
        yield
        return
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        yield
    finally:
        backend.encode_special_tokens = before


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts in one call, adding no special tokens."""
    if not tokenizer.is_fast:
        slow: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return slow
    backend = tokenizer.backend_tokenizer
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and {"text", "tokenizer"} <= manifest["settings"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path}: expected the manifest of tokens, which cannot be read: {error!r}.") from error
    if not known:
        raise ArtefactError(f"{path}: expected {FORMAT!r}, found {manifest['format']!r}. Tokenise the text again.")
    return manifest


def _is_whole(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Say whether tokens are there, made of this text in this way, with the bytes they were written with."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = _read_manifest(folder)
    return manifest["settings"] == settings and all(
        (folder / f"{name}.bin").is_file() and _sha256(folder / f"{name}.bin") == part["sha256"]
        for name, part in manifest["splits"].items()
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path, name: str, manifest: Mapping[str, Any]) -> Stream:
    """Map a split into memory; an empty file cannot be mapped."""
    told, path = manifest["splits"][name], folder / f"{name}.bin"
    dtype, num = np.dtype(told["dtype"]), int(told["tokens"])
    if not path.is_file() or path.stat().st_size != num * dtype.itemsize:
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        raise ArtefactError(
            f"{path}: expected {num} tokens, {num * dtype.itemsize} bytes, found {found}. Delete {folder}; the "
            "same command tokenises the text again."
        )
    tokens = np.memmap(path, dtype, mode="r") if num else np.zeros(0, dtype)
    return Stream(tokens, int(told["documents"]), int(told["bytes"]))
