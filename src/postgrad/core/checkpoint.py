"""Checkpoints: what trains and how far it is, written whole or not at all, with a hash for each file.

checkpoints/step-00000100/
    model.safetensors      the parameters that train (with LoRA: the adapters) and the model's own buffers; of one that
                           is kept as several tensors, each: <parameter>.<tensor>
    optimizer.safetensors  <parameter>/<name of the state>
    state.json             step, settings of the optimizer's state that are no tensors, and what the caller
    adds manifest.json          sha256 and size of the three
"""

import errno
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from postgrad.core.files import flush
from postgrad.errors import ArtefactError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")

State = dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    extra: Mapping[str, Any],
    keep: int = 2,
    state: State | None = None,
) -> Path:
    """Write a checkpoint beside the earlier ones, then delete all but the last `keep`.

    It is written under another name and renamed at the end, so whatever stops the process, the earlier ones
    stay valid. The bytes depend on nothing but the arguments.

    Args:    folder: holds the checkpoints of a run.   extra: anything JSON can say, handed back when loading.
             state: the optimizer's state_dict(), where ranks have to gather it together; asked of it by default.
    Raises:  ArtefactError: the disk is full or cannot be written.
    """
    path = folder / f"step-{step:08d}"
    temporary = folder / f".{path.name}.{uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        _clear_leftovers(folder, but=temporary)
        kept = _optimizer_state(model, optimizer, optimizer.state_dict() if state is None else state)
        _write_files(temporary, step, model, kept, extra)
        _replace_folder(temporary, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(folder, path, error) from error
    found = list_checkpoints(folder)
    upto = found.index(path) + 1
    for surplus in (*found[:upto][: -max(1, keep)], *found[upto:]):
        shutil.rmtree(surplus)  # a later one can only be damaged: this run went on from an earlier one
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """List the finished checkpoints of a run, oldest first, valid or not."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint whose files are as they were written; None when there is none at all.

    A damaged one is passed over with a warning and stays where it is.

    Raises:  ArtefactError: there are checkpoints, and all are damaged.
    """
    found = list_checkpoints(folder)
    damages: list[str] = []
    for path in reversed(found):
        damage = _damage(path)
        if not damage:
            return path
        damages.append(f"{path}: {damage}")
        warnings.warn(f"Damaged checkpoint {path}: {damage}. Looking for the one before.", stacklevel=2)
    if damages:
        raise ArtefactError(
            "Expected at least one intact checkpoint, found none:\n  " + "\n  ".join(damages) + "\n"
            f"Delete {folder} to train from the start."
        )
    return None


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer | None = None) -> State:
    """Put a checkpoint's tensors into the model and, when given, the optimizer; return the caller's extra.

    Raises:  ArtefactError: the model's tensors differ from the checkpoint's; names the first that does.
    """
    state: State = json.loads((path / "state.json").read_text(encoding="utf-8"))
    stored = load_file(path / "model.safetensors")
    own = model_tensors(model)
    _compare(path, stored, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    if optimizer is not None:
        _load_optimizer(path, model, optimizer, state["optimizer"])
    extra: State = state["extra"]
    return extra


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List what a checkpoint holds of a model: parameters that train, buffers that are part of its state."""
    kept = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return dict(part for name, param in params.items() for part in _parts(name, param)) | buffers


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """List the plain tensors that a tensor is made of, itself where it is one."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            yield f"{name}.{inner}", attrgetter(inner)(tensor)
    else:
        yield name, tensor


def _write_files(
    folder: Path, step: int, model: nn.Module, kept: tuple[dict[str, Tensor], State], extra: Mapping[str, Any]
) -> None:
    """Write the files and their manifest, all flushed to disk."""
    tensors, numbers = kept
    save_file(_plain(model_tensors(model)), folder / "model.safetensors")
    save_file(_plain(tensors), folder / "optimizer.safetensors")
    state = {"step": step, "optimizer": numbers, "extra": dict(extra)}
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    manifest = {name: {"sha256": _sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in FILES}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in (*(folder / name for name in FILES), folder / "manifest.json", folder):
        flush(path)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, each with memory of its own, as safetensors wants them."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in plain.items()
    }


def _replace_folder(temporary: Path, path: Path) -> None:
    """Give the finished folder its name; what had it before (the same step, or a damaged one) goes."""
    if path.exists():
        aside = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        path.rename(aside)
        temporary.rename(path)
        shutil.rmtree(aside)
    else:
        temporary.rename(path)
    flush(path.parent)


def _clear_leftovers(folder: Path, but: Path) -> None:
    """Delete what a killed process left half written."""
    for path in folder.glob(".step-*.tmp"):
        if path != but:
            shutil.rmtree(path)


def _damage(path: Path) -> str:
    """Say what is wrong with a checkpoint; "" when nothing is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in FILES:
            if (path / name).stat().st_size != manifest[name]["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, {manifest[name]['bytes']} were written"
            if _sha256(path / name) != manifest[name]["sha256"]:
                return f"{name} does not have the sha256 it was written with"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read: {error!r}"
    return ""


def _compare(path: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another model, naming the first tensor that differs."""
    for name in {**own, **stored}:
        here = _describe(own[name]) if name in own else "no such tensor that trains"
        there = _describe(stored[name]) if name in stored else "no such tensor"
        if here != there:
            raise ArtefactError(
                f"{path} belongs to another model: '{name}' is {here} in the model and {there} in the checkpoint. "
                "Use the model and the precision the run was started with, or another runtime.folder."
            )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _optimizer_state(model: nn.Module, optimizer: Optimizer, stored: State) -> tuple[dict[str, Tensor], State]:
    """Split the optimizer's state into tensors and the rest, under the names of the parameters."""
    tensors: dict[str, Tensor] = {}
    numbers: State = {}
    state = stored["state"]
    for index, name in enumerate(_names(model, optimizer)):
        for key, value in state.get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def _load_optimizer(path: Path, model: nn.Module, optimizer: Optimizer, numbers: State) -> None:
    """Give each parameter its state back; settings such as the learning rate stay the config's."""
    places = {name: index for index, name in enumerate(_names(model, optimizer))}
    state: dict[int, State] = {}
    for full, value in {**load_file(path / "optimizer.safetensors"), **numbers}.items():
        name, _, key = full.rpartition("/")
        if name not in places:
            raise ArtefactError(f"{path}: the optimizer's state of '{name}' has no parameter in this run.")
        state.setdefault(places[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Name the optimizer's parameters, in its order."""
    names = {id(param): name for name, param in model.named_parameters()}
    params: Sequence[Any] = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(id(param) in names for param in params), "the optimizer must hold parameters of the model only"
    return [names[id(param)] for param in params]


def _unwritable(folder: Path, path: Path, error: Exception) -> ArtefactError:
    """Say that a checkpoint could not be written, and what stays."""
    earlier = list_checkpoints(folder)
    stays = f"{earlier[-1]} stays valid" if earlier else "there is no earlier one"
    full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space" in str(error)
    cure = "Free some space" if full else "Make the folder writable"
    return ArtefactError(f"Cannot write checkpoint {path}: {error}. {cure}; {stays}, and the same command continues.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
