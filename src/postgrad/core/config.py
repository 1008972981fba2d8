"""Settings: frozen dataclasses that every method shares, and the strict files they are read from.

A recipe is TOML (or JSON of the same shape). Unknown keys and wrong types are refused with the file, the
dotted key and the nearest name. `dump_config` writes what `load_config` reads back exactly, so a run's record
re-runs it.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from postgrad.errors import ConfigError

Config = TypeVar("Config")
Value = str | int | float | bool | tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights, which of them train, and how conversations are written for them."""

    path: str = "tiny"
    """A hub name, a save_pretrained folder, or "tiny": a small Llama with a byte tokenizer, from the seed."""
    tiny_width: int = 64
    """Hidden width of the tiny model."""
    tiny_layers: int = 2
    """Number of layers of the tiny model."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 = all weights train."""
    lora_alpha: float = 16.0
    """LoRA scale: the update is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs dropped in training."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters; empty = every linear layer of the blocks."""
    chat_template: str = ""
    """A built-in template's name, a .jinja file, or "" = the tokenizer's own."""
    layout: Literal["auto", "tree", "flat"] = "auto"
    """Packed rows: "tree" shares a prompt between its answers, "flat" repeats it, "auto" probes the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, how many of them, and what happens to long ones."""

    path: str = ""
    """A file, a folder, a run folder of an earlier stage, or a hub data set; "" = the built-in task."""
    split: str = "train"
    """Name of the split, for data sets that have several."""
    limit: int = 0
    """Use the first rows only; 0 = all."""
    held_out: float = 0.1
    """Share of prompts set aside for evaluation, chosen by a hash of the prompt."""
    max_length: int = 1024
    """Longest prompt plus answer, in tokens."""
    truncate: Literal["oldest", "end", "drop"] = "oldest"
    """What gives way when a row is too long: its oldest exchanges, its end, or the whole row."""
    row_length: int = 0
    """Least width of a packed row, in tokens; 0 = what the device is fastest with."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate over the run."""

    lr: float = 1e-4
    """Highest learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes from its highest to its last value."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    final: float = 0.1
    """Last learning rate, as a share of the highest."""
    stairs: int = 0
    """Change the learning rate only every so many steps, as schedules by epoch do; 0 = at every step."""
    clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """FP8 training: which numbers have 8 bits, and how they are rounded and sent."""

    level: Literal["off", "O1", "O2", "O3"] = "off"
    """"O1": products, gradients and their sums over ranks; "O2": the optimizer too; "O3": dealt out to the ranks."""
    products: Literal["fp8", "full"] = "fp8"
    """Matrix products: in 8 bits, or in the forward pass's precision, which any device can."""
    reduction: Literal["a2a", "native"] = "a2a"
    """Sums over ranks: "a2a" adds in float32 after one exchange; "native" adds in FP8, scaled by the paper's mu."""
    scaling: Literal["jit", "delayed"] = "jit"
    """Scales of products: measured just in time, or the greatest of the last 16 steps."""
    scales: Literal["predictive", "jit"] = "predictive"
    """Scales of the optimizer's states: bounds known before the step, or measured as the paper does."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding of weights and states."""
    state: Literal["paper", "e4m3_v", "e4m3_master", "bf16_master"] = "paper"
    """Formats of O2 and O3; all but "paper" are its ablations, which lose accuracy."""
    min_size: int = 256
    """Linear layers with fewer inputs or outputs keep their precision; 16 is the least."""
    watch_every: int = 0
    """Steps between measurements of underflow, saturation and noise of every tensor; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, on how much at a time, and what to keep."""

    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int = 0
    """Optimizer steps; 0 = as many as the epochs take."""
    batch_size: int = 32
    """Items an optimizer step, over all ranks and micro-batches."""
    micro_tokens: int = 8192
    """Packed tokens a forward pass; lower it when memory runs out, the result stays the same."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 = at the end only."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints kept; older ones are deleted."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    precision: PrecisionConfig = PrecisionConfig()
    """FP8, or not."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how a run happens."""

    folder: str = ""
    """Run folder; "" = runs/<method>. The same command continues what it finds there."""
    seed: int = 0
    """Every random choice of the run follows from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; "auto" takes a GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward pass; weights and optimizer stay fp32."""
    threads: int = 0
    """CPU threads of a rank; 0 = all cores shared by this machine's ranks, but one for the tiny model."""
    deterministic: bool = True
    """Take deterministic kernels: the same seed gives the same bytes."""
    overwrite: bool = False
    """Empty a run folder that holds another configuration instead of refusing it."""
    quiet: bool = False
    """Print no progress."""


def load_config(cls: type[Config], path: Path | str, what: str = "recipe") -> Config:
    """Read a recipe, or another file of settings, strictly; what it does not set keeps its default.

    Args:    path: TOML, or JSON when the name ends in .json.  what: the file is, for errors.
    Raises:  ConfigError: no such file, bad syntax, unknown or missing key, wrong type; with file and key.
    """
    path = Path(path)
    return _build(cls, _read(path, what), _Place(path, cls))


def dump_config(config: Any) -> str:
    """Write a config as TOML that `load_config` reads back to an equal config."""
    return "\n".join(_lines(config, "")).strip() + "\n"


def flatten_config(config: Any) -> dict[str, Value]:
    """List every setting under its dotted key, in the order of the fields."""
    flat: dict[str, Value] = {}
    for name, value in _items(config):
        if is_dataclass(value):
            flat |= {f"{name}.{key}": inner for key, inner in flatten_config(value).items()}
        else:
            flat[name] = value
    return flat


def diff_config(a: Any, b: Any) -> list[str]:
    """Say what differs, one line a setting: "train.optim.lr: 0.1 -> 0.2"."""
    left, right = flatten_config(a), flatten_config(b)
    return [
        f"{key}: {_show(left, key)} -> {_show(right, key)}"
        for key in left | right
        if _show(left, key) != _show(right, key)
    ]


def nearest(name: str, names: Iterable[str]) -> str:
    """Find the name most like `name`, or "" when none is alike."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return found[0] if found else ""


@dataclass(frozen=True)
class _Place:
    """Where in which file a value stands, to say so in an error."""

    path: Path
    root: type
    key: str = ""

    def at(self, name: str) -> "_Place":
        return _Place(self.path, self.root, f"{self.key}.{name}" if self.key else name)

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.path}: {self.key}: {message}" if self.key else f"{self.path}: {message}")


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: expected a {what}, a TOML or JSON file; {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text; {error}.") from error
    parse = _parse_json if path.suffix == ".json" else tomllib.loads
    try:
        data = parse(text)
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path}: expected {kind}, which it is not: {error}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object of settings, found {_kind(data)}.")
    return data


def _parse_json(text: str) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            raise ValueError(f"a key stands twice among {[key for key, _ in pairs]}")
        return data

    return json.loads(text, object_pairs_hook=no_duplicates)


def _build(cls: type[Config], table: Mapping[str, Any], place: _Place) -> Config:
    hints = _hints(cls)
    for name in table:
        if name not in hints:
            raise _unknown(name, hints, place)
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.name not in table and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise place.at(missing[0]).error("this setting has no default; give it a value.")
    return cls(**{name: _convert(value, hints[name], place.at(name)) for name, value in table.items()})


def _unknown(name: str, hints: Mapping[str, Any], place: _Place) -> ConfigError:
    key = place.at(name).key
    everywhere = _keys(place.root)
    same_leaf = [other for other in everywhere if other.rpartition(".")[2] == name]
    beside = nearest(name, hints)
    guess = (place.at(beside).key if beside else "") or next(iter(same_leaf), "") or nearest(key, everywhere)
    hint = f"; nearest is '{guess}'" if guess else ""
    group = f"[{place.key}]" if place.key else "the top level"
    error = f"unknown key '{key}'{hint}. Known in {group}: {', '.join(hints)}."
    return ConfigError(f"{place.path}: {error}")


def _convert(value: Any, hint: Any, place: _Place) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise place.error(f"expected a table of settings, found {_kind(value)}.")
        return _build(hint, value, place)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        return _choose(value, get_args(hint), place)
    if get_origin(hint) is tuple:
        return _convert_list(value, get_args(hint), place)
    assert hint in _NAMES, f"{place.key}: a config field may not be of type {hint}"
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise place.error(f"expected {_NAMES[hint]}, found {_kind(value)}.")
    return value


def _choose(value: Any, choices: tuple[Any, ...], place: _Place) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return value
    guess = nearest(str(value), [str(choice) for choice in choices])
    hint = f" Did you mean '{guess}'?" if guess else ""
    raise place.error(f"expected one of {', '.join(map(repr, choices))}; found {_kind(value)}.{hint}")


def _convert_list(value: Any, hints: tuple[Any, ...], place: _Place) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise place.error(f"expected a list, found {_kind(value)}.")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise place.error(f"expected a list of {len(hints)} values, found {len(value)}.")
    return tuple(
        _convert(item, hint, _Place(place.path, place.root, f"{place.key}[{i}]"))
        for i, (item, hint) in enumerate(zip(value, hints, strict=True))
    )


_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
}


def _kind(value: Any) -> str:
    kind = _KINDS.get(type(value), type(value).__name__)
    return kind if isinstance(value, dict) else f"{value!r} ({kind})"


def _hints(cls: type) -> dict[str, Any]:
    types = get_type_hints(cls)
    return {f.name: types[f.name] for f in fields(cls)}


def _keys(cls: type) -> list[str]:
    keys: list[str] = []
    for name, hint in _hints(cls).items():
        keys += [f"{name}.{key}" for key in _keys(hint)] if is_dataclass(hint) else [name]  # type: ignore[arg-type]
    return keys


def _items(config: Any) -> list[tuple[str, Any]]:
    values = vars(config)
    # A float field may hold an int by default; as a float it is written the same way it is read.
    return [
        (name, float(values[name]) if hint is float else values[name]) for name, hint in _hints(type(config)).items()
    ]


def _lines(config: Any, prefix: str) -> list[str]:
    items = _items(config)
    lines = [f"{name} = {_toml(value)}" for name, value in items if not is_dataclass(value)]
    for name, value in items:
        if is_dataclass(value):
            lines += ["", f"[{prefix}{name}]", *_lines(value, f"{prefix}{name}.")]
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    assert isinstance(value, str), f"a config value may not be of type {type(value).__name__}"
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _show(flat: Mapping[str, Value], key: str) -> str:
    return _toml(flat[key]) if key in flat else "(not there)"
