"""The command line answers, refuses and stops in the user's words."""

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from postgrad import __version__
from postgrad.__main__ import main
from postgrad.methods import METHODS, config_class, method

TOY = '''"""Play with settings, and nothing else.

More words.
"""
from dataclasses import dataclass
from pathlib import Path

from postgrad.core.config import RuntimeConfig, TrainConfig
from postgrad.core.report import Report
from postgrad.errors import ConfigError, Diverged, Interrupted

LOSS = None


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Settings of the toy."""

    beta: float = 0.5
    """Pull towards nothing, > 0."""
    fail: str = ""
    """What goes wrong."""
    train: TrainConfig = TrainConfig()
    """Training."""


def check(config):
    """Refuse a negative beta."""
    if config.beta < 0:
        raise ConfigError(f"beta must be > 0, got {config.beta}")


def plan(config):
    """Count."""
    return {"steps": 12345, "memory (GiB)": 1.23456789, "policy": "[bold]tiny[/bold]"}


def run(config):
    """Fail as told."""
    check(config)
    if config.fail == "disk":
        raise OSError(28, "No space left on device", "model.safetensors")
    if config.fail == "deep disk":
        try:
            raise OSError(28, "No space left on device", "model.safetensors")
        except OSError as error:
            raise RuntimeError("writer died") from error
    if config.fail == "rights":
        raise PermissionError(13, "Permission denied", "runs")
    if config.fail == "nan":
        raise Diverged("loss is nan at step 3")
    if config.fail == "signal":
        raise Interrupted("Saved step 7.")
    if config.fail == "ctrl-c":
        raise KeyboardInterrupt
    return Report(method="toy", folder=Path("runs/toy"), results={"beta": config.beta})
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run in, and a method `toy` beside the real ones."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(code)
    monkeypatch.setitem(METHODS, "toy", "toy")
    monkeypatch.setenv("COLUMNS", "200")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield work
    sys.modules.pop("toy", None)


Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_methods(
    toy: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("postgrad.__main__.METHODS", {"toy": "toy"})
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "usage: postgrad METHOD [recipe.toml] [--field value] [--dry-run]" in out
    assert "toy    Play with settings, and nothing else." in out


def test_version(capsys: Output) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"postgrad {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from postgrad.__main__ import main; assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'matplotlib', 'numpy', 'tyro'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_method_names_the_nearest(capsys: Output) -> None:
    assert main(["rewrad"]) == 2
    assert "Unknown method 'rewrad'; nearest is 'reward'. Methods: align, sft," in capsys.readouterr().err


def test_a_method_runs_with_its_defaults(toy: Path, capsys: Output) -> None:
    assert main(["toy"]) == 0
    assert "0.5" in capsys.readouterr().out


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(toy: Path, capsys: Output) -> None:
    Path("toy.toml").write_text("beta = 2\n[train.optim]\nlr = 5e-7\nclip = 3")
    assert main(["toy", "toy.toml", "--train.optim.lr", "0.25", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "beta = 2.0\n" in out and "lr = 0.25\n" in out and "clip = 3.0\n" in out and "eps = 1e-08\n" in out


def test_dry_run_prints_a_recipe_and_the_plan_and_writes_nothing(toy: Path, capsys: Output) -> None:
    assert main(["toy", "--dry-run", "--beta", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith('# postgrad toy\nbeta = 3.0\nfail = ""\n\n[train]\n')
    assert "12,345" in out and "1.235" in out and "[bold]tiny[/bold]" in out
    assert list(toy.iterdir()) == []


def test_the_dry_run_is_itself_a_recipe(toy: Path, capsys: Output) -> None:
    assert main(["toy", "--dry-run", "--beta", "3"]) == 0
    recipe, _, _ = capsys.readouterr().out.partition("\n\n┏")
    Path("again.toml").write_text(recipe)
    assert main(["toy", "again.toml", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(recipe)


def test_dry_run_checks_the_settings(toy: Path, capsys: Output) -> None:
    assert main(["toy", "--beta", "-1", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "beta must be > 0, got -1.0\n" and captured.out == ""


def test_help_of_a_method_tells_each_setting(toy: Path, capsys: Output) -> None:
    assert main(["toy", "--help"]) == 0
    out = capsys.readouterr().out
    assert "postgrad toy [recipe.toml]" in out and "Play with settings" in out and "--dry-run" in out
    assert "Pull towards nothing, > 0. (default: 0.5)" in out and "--train.optim.lr" in out


def test_a_wrong_flag_names_the_nearest(toy: Path, capsys: Output) -> None:
    assert main(["toy", "--train.optm.lr", "1"]) == 2
    assert "--train.optim.lr" in capsys.readouterr().err
    assert main(["toy", "--beta", "much"]) == 2
    assert "--beta" in capsys.readouterr().err


def test_a_wrong_recipe_is_refused_without_traceback(toy: Path, capsys: Output) -> None:
    Path("toy.toml").write_text("[train]\nmax_step = 3")
    assert main(["toy", "toy.toml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("toy.toml: unknown key 'train.max_step'; nearest is 'train.max_steps'. Known in [train]:")
    assert "Traceback" not in err
    assert main(["toy", "absent.toml"]) == 2
    assert "absent.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fail", "status", "words"),
    [
        (
            "disk",
            1,
            "The disk is full: [Errno 28] No space left on device: 'model.safetensors'. Free some space",
        ),
        ("deep disk", 1, "The disk is full: writer died. Free some space; the same command continues."),
        ("nan", 1, "loss is nan at step 3"),
        ("signal", 130, "Saved step 7. The same command continues."),
        ("ctrl-c", 130, "Stopped. The same command continues."),
    ],
)
def test_what_goes_wrong_is_said_in_one_message(toy: Path, capsys: Output, fail: str, status: int, words: str) -> None:
    assert main(["toy", "--fail", fail]) == status
    err = capsys.readouterr().err
    assert err.startswith(words) and "Traceback" not in err


def test_other_errors_keep_their_traceback(toy: Path) -> None:
    with pytest.raises(PermissionError):
        main(["toy", "--fail", "rights"])


def test_only_rank_zero_prints(toy: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["toy"]) == 0
    assert capsys.readouterr().out == ""


def test_config_class_is_found_by_name(toy: Path) -> None:
    assert config_class("toy") is method("toy").ToyConfig


def test_errno_of_a_full_disk_is_what_the_toy_says() -> None:
    assert errno.ENOSPC == 28


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--lr", "0.5"], "lr = 0.5"),
        (["--optim.lr=0.5"], "lr = 0.5"),
        (["--precision.level", "O2"], 'level = "O2"'),
        (["--save_every", "7"], "save_every = 7"),
        (["--no-deterministic"], "deterministic = false"),
        (["--runtime.no-deterministic"], "deterministic = false"),
    ],
)
def test_the_end_of_a_settings_name_is_enough(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", *flags, "--dry-run"]) == 0
    assert line in capsys.readouterr().out.splitlines()


def test_an_end_of_several_names_is_refused_with_their_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--path", "x"]) == 2
    error = capsys.readouterr().err
    assert "--path: several settings end so: --model.path, --data.path." in error
