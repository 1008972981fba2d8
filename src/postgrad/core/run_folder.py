"""The run folder: held by one process, labelled with one configuration, and what a run leaves in it."""

import fcntl
import functools
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from postgrad import __version__
from postgrad.core.config import diff_config, dump_config, load_config
from postgrad.core.distributed import world
from postgrad.core.files import sweep, write_json, write_text
from postgrad.core.report import Note, Plot, Report, Section, Series, Table
from postgrad.errors import ArtefactError, ConfigError, UserError

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "pyarrow", "numpy")

LABELS = {".lock", "config.toml", "environment.json"}
"""What is in a folder before a run leaves anything."""

_locks: dict[Path, int] = {}  # run folders this process holds -> their open lock files


def take_folder(folder: Path, config: Any, method: str, device: torch.device) -> None:
    """Make, lock and label the folder; leave it unlocked when it cannot be taken.

    Raises:  ConfigError: another process holds it, it holds another configuration, or nothing can be written
             there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
    except OSError as error:
        raise ConfigError(f"runtime.folder: cannot write in {folder}: {error.strerror}. Choose another.") from error
    try:
        record = folder / "config.toml"
        _clear_other_run(record, config, method)
        sweep(folder)
        if not record.exists():
            write_text(record, f"# postgrad {method}\n{dump_config(config)}")
        write_json(folder / "environment.json", _environment(device))
    except BaseException:
        release_folder(folder)
        raise


def release_folder(folder: Path) -> None:
    """Let go of the folder; do nothing when this process does not hold it."""
    handle = _locks.pop(folder.resolve(), None)
    if handle is not None:
        os.close(handle)


def write_result(report: Report) -> None:
    """Record a report: results in result.json, which a repeated run repeats exactly, and sections.json."""
    sections = [{"type": type(section).__name__, **asdict(section)} for section in report.sections]
    # A missing figure is NaN, which write_json refuses and Python's reader takes.
    write_text(report.folder / "sections.json", json.dumps(sections, indent=1, ensure_ascii=False) + "\n")
    result = {"method": report.method, "results": dict(report.results)}
    write_text(report.folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def read_result(folder: Path) -> Report | None:
    """Read the report that a finished run left; None when the run is not finished.

    Raises:  ArtefactError: the files cannot be read.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        sections = json.loads((folder / "sections.json").read_text(encoding="utf-8"))
        return Report(result["method"], folder, result["results"], tuple(map(_section, sections)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{path}: expected the results of a finished run, which cannot be read: {error!r}. "
            "Delete it; the same command then finishes the run again."
        ) from error


def cut_log(path: Path, step: int) -> None:
    """Drop from a log of JSON lines what was written after `step`, and what a killed process left half written."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept: list[str] = []
    for line in text.splitlines(keepends=True):
        row = _parse(line)
        if row is not None and row.get("step", 0) <= step:
            kept.append(line)
    if "".join(kept) != text:
        write_text(path, "".join(kept))


def _parse(line: str) -> dict[str, Any] | None:
    """Read one whole line; None when it is damaged."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _section(data: dict[str, Any]) -> Section:
    """Make a section from what `asdict` made of it."""
    fields = {key: _tuples(value) for key, value in data.items() if key != "type"}
    match data["type"]:
        case "Table":
            return Table(**fields)
        case "Plot":
            lines = [{key: _tuples(value) for key, value in line.items()} for line in data["series"]]
            return Plot(**{**fields, "series": tuple(Series(**line) for line in lines)})
        case "Note":
            return Note(**fields)
        case kind:
            raise ValueError(f"unknown section {kind!r}")


def _tuples(value: Any) -> Any:
    """Turn the lists of JSON back into tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _lock(folder: Path) -> None:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    key = folder.resolve()
    if key in _locks and os.fstat(_locks[key]).st_nlink > 0:
        return  # ours already: a run that failed in this process, tried again
    release_folder(folder)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace") or "another process"
        os.close(handle)
        raise ConfigError(
            f"runtime.folder: {folder} is in use by {holder}. Wait for it, stop it, or choose another folder."
        ) from None
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _locks[key] = handle


def _clear_other_run(record: Path, config: Any, method: str) -> None:
    """Refuse a folder that holds another run, or empty it when the config says so.

    A run that stopped before it left anything, at a file that is missing for instance, gives way: the mended command
    is another configuration.
    """
    differences = _differences(record, config, method) if record.exists() else []
    if not differences:
        return
    folder = record.parent
    if _is_unused(folder, record):
        record.unlink()
        return
    if not config.runtime.overwrite:
        raise ConfigError(
            f"runtime.folder: {folder} holds another run, and the settings differ:\n  "
            + "\n  ".join(differences)
            + "\nChoose another runtime.folder, or set runtime.overwrite to true to empty this one."
        )
    if Path.cwd().is_relative_to(folder.resolve()) or (folder / ".git").exists():
        raise ConfigError(
            f"runtime.overwrite: {folder} is the working folder, holds it, or is a git checkout; it is not "
            "emptied. Choose another runtime.folder."
        )
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _is_unused(folder: Path, record: Path) -> bool:
    """Say whether a folder holds no more than the label of a run."""
    text = record.read_text(encoding="utf-8", errors="replace")
    return text.startswith("# postgrad ") and {path.name for path in folder.iterdir()} <= LABELS


def _differences(record: Path, config: Any, method: str) -> list[str]:
    """List how the run on record differs; where it lies and what it prints do not count."""
    first_line = record.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    label = first_line.removeprefix("# postgrad ")
    if label != method:
        return [f"method: {label} -> {method}"]
    try:
        other: Any = load_config(type(config), record)
    except UserError as error:
        return [f"config.toml cannot be read: {error}"]
    mine = config.runtime
    same = replace(other.runtime, folder=mine.folder, overwrite=mine.overwrite, quiet=mine.quiet)
    return diff_config(replace(other, runtime=same), config)


def _environment(device: torch.device) -> dict[str, object]:
    """Describe machine, versions and command; never the environment variables, which hold keys."""
    cuda = device.type == "cuda"
    return {
        "postgrad": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        **_versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cuda": str(torch.version.cuda) if cuda else "",
        "num_ranks": world(),
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count() or 0,
        "command": shlex.join(["postgrad", *sys.argv[1:]]) if sys.argv else "",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


@functools.cache
def _git_commit() -> str:
    """Name the commit this file runs from, with "+" when files differ from it; "" outside a checkout."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in a foreign checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
