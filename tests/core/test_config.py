"""Recipes are read strictly and written so that they read back exactly."""

import json
import math
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.core.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
    diff_config,
    dump_config,
    flatten_config,
    load_config,
    nearest,
)
from postgrad.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method's settings in small."""

    beta: float = 0.5
    depth: int = 3
    note: str = ""
    kind: Literal["left", "right"] = "left"
    dry: bool = False
    names: tuple[str, ...] = ("a", "b")
    betas: tuple[float, float] = (0.9, 0.99)
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def refuse(folder: Path, text: str, name: str = "recipe.toml") -> str:
    with pytest.raises(ConfigError) as error:
        load_config(Recipe, write(folder, text, name))
    message = str(error.value)
    assert message.startswith(str(folder / name))
    return message.removeprefix(str(folder / name))


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(Recipe, write(tmp_path, "")) == Recipe()


def test_a_recipe_sets_what_it_names(tmp_path: Path) -> None:
    text = 'beta = 1\nnames = []\nkind = "right"\n[train.optim]\nlr = 5e-7\n[train]\nmax_steps = 4\n'
    config = load_config(Recipe, write(tmp_path, text))
    train = TrainConfig(max_steps=4, optim=OptimConfig(lr=5e-7))
    assert config == Recipe(beta=1.0, names=(), kind="right", train=train)
    assert type(config.beta) is float


def test_json_of_the_same_shape_is_a_recipe(tmp_path: Path) -> None:
    data = {"depth": 4, "train": {"optim": {"lr": 1e-3}}, "betas": [0, 1]}
    config = load_config(Recipe, write(tmp_path, json.dumps(data), "recipe.json"))
    assert config == Recipe(depth=4, betas=(0.0, 1.0), train=TrainConfig(optim=OptimConfig(lr=1e-3)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[train.optim]\nlearning = 1",
            ": unknown key 'train.optim.learning'; nearest is 'train.optim.lr'. Known in [train.optim]: lr,",
        ),
        ("[train.optim]\nwarmpu = 1", ": unknown key 'train.optim.warmpu'; nearest is 'train.optim.warmup'."),
        ("[train]\nlr = 1", ": unknown key 'train.lr'; nearest is 'train.optim.lr'."),
        (
            "lora_rank = 1",
            ": unknown key 'lora_rank'; nearest is 'model.lora_rank'. Known in the top level: beta",
        ),
        ("max-steps = 1", ": unknown key 'max-steps'; nearest is 'train.max_steps'."),
        ("beta = '1'", ": beta: expected a number, found '1' (text)."),
        ("beta = true", ": beta: expected a number, found True (true or false)."),
        ("depth = 3.0", ": depth: expected a whole number, found 3.0 (a number)."),
        ("dry = 1", ": dry: expected true or false, found 1 (a whole number)."),
        ("note = 1979-05-27", ": note: expected text in quotes, found datetime.date(1979, 5, 27) (date)."),
        (
            "kind = 'wright'",
            ": kind: expected one of 'left', 'right'; found 'wright' (text). Did you mean 'right'?",
        ),
        ("names = 'a'", ": names: expected a list, found 'a' (text)."),
        ("names = ['a', 1]", ": names[1]: expected text in quotes, found 1 (a whole number)."),
        ("betas = [1.0]", ": betas: expected a list of 2 values, found 1."),
        ("train = 3", ": train: expected a table of settings, found 3 (a whole number)."),
        ("note = {}", ": note: expected text in quotes, found a table."),
        ("beta = ", ": expected TOML, which it is not: Invalid value (at end of document)"),
        ("beta = 1\nbeta = 2", ": expected TOML, which it is not: Cannot overwrite a value"),
    ],
)
def test_a_wrong_recipe_is_refused_with_file_key_and_cure(tmp_path: Path, text: str, message: str) -> None:
    assert refuse(tmp_path, text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"beta": 1, "beta": 2}',
            ": expected JSON, which it is not: a key stands twice among ['beta', 'beta'].",
        ),
        ("[1]", ": expected an object of settings, found [1] (a list)."),
        ("{", ": expected JSON, which it is not:"),
    ],
)
def test_wrong_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert refuse(tmp_path, text, "recipe.json").startswith(message)


def test_a_missing_file_and_one_that_is_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        load_config(Recipe, tmp_path / "recipe.toml")
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="expected UTF-8 text"):
        load_config(Recipe, tmp_path / "recipe.toml")


def test_a_setting_without_default_must_be_given(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy:
        size: int

    with pytest.raises(ConfigError, match=r"recipe\.toml: size: this setting has no default"):
        load_config(Needy, write(tmp_path, ""))
    assert load_config(Needy, write(tmp_path, "size = 2")) == Needy(size=2)


texts = st.text(st.characters(codec="utf-8"))
numbers = st.floats(allow_nan=False)


@given(beta=numbers, depth=st.integers(-(2**63), 2**63 - 1), note=texts, names=st.lists(texts), lr=numbers)
def test_dump_and_load_are_inverse(beta: float, depth: int, note: str, names: list[str], lr: float) -> None:
    train = TrainConfig(optim=OptimConfig(lr=lr))
    config = Recipe(beta=beta, depth=depth, note=note, names=tuple(names), dry=True, train=train)
    with tempfile.TemporaryDirectory() as folder:
        back = load_config(Recipe, write(Path(folder), dump_config(config)))
    assert back == config
    assert dump_config(back) == dump_config(config)


def test_dump_goes_through_a_file(tmp_path: Path) -> None:
    config = Recipe(note='quote " back \\ line\n\x7f é', beta=math.inf, kind="right")
    assert load_config(Recipe, write(tmp_path, "# postgrad recipe\n" + dump_config(config))) == config


def test_dump_reads_like_a_recipe() -> None:
    lines = dump_config(Recipe(beta=2)).splitlines()
    assert lines[:4] == ["beta = 2.0", "depth = 3", 'note = ""', 'kind = "left"']
    assert "[train.optim]" in lines
    assert 'names = ["a", "b"]' in lines


def test_diff_names_each_setting_that_changed() -> None:
    changed = Recipe(dry=True, train=TrainConfig(optim=OptimConfig(lr=0.2)))
    assert diff_config(Recipe(), Recipe()) == []
    assert diff_config(Recipe(), changed) == ["dry: false -> true", "train.optim.lr: 0.0001 -> 0.2"]
    assert diff_config(DataConfig(), RuntimeConfig())[0] == 'path: "" -> (not there)'


def test_an_int_where_a_float_is_meant_is_no_difference() -> None:
    assert diff_config(Recipe(beta=1), Recipe(beta=1.0)) == []
    assert flatten_config(Recipe(beta=1))["beta"] == 1.0


def test_nearest_says_nothing_when_nothing_is_alike() -> None:
    assert nearest("rewrad", ["sft", "reward"]) == "reward"
    assert nearest("xyz", ["sft", "reward"]) == ""


@pytest.mark.parametrize("cls", [ModelConfig, DataConfig, OptimConfig, TrainConfig, RuntimeConfig])
def test_shared_groups_are_frozen_and_all_default(cls: type) -> None:
    config = cls()
    with pytest.raises(AttributeError):
        setattr(config, fields(cls)[0].name, None)
    assert replace(config) == config
