"""How a request is erased: the settings, and presets of them.

"safe" is ours and the default. "gs-lora" and "gs-lora++" are the papers' terms by the same fast procedure; "paper" and
"paper++" follow the released continual scripts (arXiv 2403.11530, 2501.09705).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeVar

from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.errors import ConfigError
from postgrad.forgetting.detection import DetectorObjectiveConfig
from postgrad.forgetting.leak_terms import LeakConfig, check_leak
from postgrad.forgetting.losses import ObjectiveConfig

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """How a request is erased."""

    rank: int = 8
    """Rank of the adapter's pairs."""
    scale: float = 4.0
    """LoRA alpha: the update is multiplied by scale / rank."""
    placement: Literal["ffn", "attention"] = "ffn"
    """Which linear layers of a block get pairs."""
    grouping: Literal["block", "lora", "matrix"] = "block"
    """Which matrices are silenced together."""
    alpha_from: int = 0
    """Epoch from which the sparsity penalty counts."""
    select_epochs: int = 1
    """Epochs of the sparse phase on every block; 0 = all blocks stay."""
    blocks: int = 2
    """Blocks that stay, the strongest of the later half; where they do not suffice, twice as many."""
    least_steps: int = 120
    """Steps at least: epochs of few images are repeated until there are so many."""
    snap: float = 1e-2
    """Groups whose norm ends below this become exactly zero and are taken off."""
    patience: int = 0
    """Epochs in a row that must find all forgotten, and hidden, before training stops; 0 = train to the end."""
    floor: float = 5.0
    """Points of accuracy on the retained training images that may be lost, else the request is refused; 100 = any."""
    together: bool = True
    """One forward pass for both sets, begun at the first block that changes; False = two, through the whole network."""
    objective: ObjectiveConfig = ObjectiveConfig(beta=0.2, bound=8.0, alpha=0.003, reduction="sample")
    leak: LeakConfig = LeakConfig()
    train: TrainConfig = TrainConfig(
        epochs=10,
        batch_size=32,
        save_every=0,
        keep_checkpoints=1,
        optim=OptimConfig(lr=1e-2, warmup=0.05, final=0.01, clip=1.0),
    )


_SAFE = EraseConfig()
NO_LEAK = LeakConfig(keep=0.0, proxy=0.0, scatter=0.0, knn=0.0)
_PLAIN = replace(
    # where images are answered with certainty the forgetting term hardly has a slope: alpha stays below it
    _SAFE, objective=replace(_SAFE.objective, alpha=1e-4), leak=NO_LEAK, scale=1.0, least_steps=0, patience=1,
    train=replace(_SAFE.train, epochs=40),
)  # fmt: skip
_THOROUGH = replace(
    _SAFE, select_epochs=0, least_steps=250, leak=replace(_SAFE.leak, probe=0.5, compress=5.0),
    train=replace(_SAFE.train, epochs=4, optim=replace(_SAFE.train.optim, lr=2e-2)),
)  # fmt: skip
_PAPER = EraseConfig(
    scale=1.0, select_epochs=0, blocks=0, least_steps=0, snap=0.0, floor=100.0, together=False,
    objective=ObjectiveConfig(beta=0.2, bound=105.0, alpha=1e-4), leak=_PLAIN.leak,
    train=TrainConfig(
        epochs=100, batch_size=48, save_every=0, keep_checkpoints=1,
        optim=OptimConfig(lr=1e-2, weight_decay=0.05, warmup=0.0, final=1e-3, clip=0.0, stairs=1),
    ),
)  # fmt: skip
PRESETS: Mapping[str, EraseConfig] = MappingProxyType(
    {
        "safe": _SAFE,
        "thorough": _THOROUGH,
        "gs-lora": _PLAIN,
        "gs-lora++": replace(_PLAIN, objective=replace(_PLAIN.objective, weight_forget=0.01, weight_retain=0.01)),
        "paper": _PAPER,
        "paper++": replace(_PAPER, objective=replace(_PAPER.objective, weight_forget=0.01)),
    }
)
"""safe: ours, with the leak terms; thorough: the same on all blocks, which hides more and keeps less.
gs-lora, gs-lora++: the papers' terms by the same fast procedure. paper, paper++: as the released continual scripts."""


def careful(config: EraseConfig) -> EraseConfig:
    """Fit settings with a proxy term for a request that leaves classes without any image.

    Forgotten images are then answered as the kept classes they look like, those without images among them, and are
    pushed no further: what only drives their own class down takes its neighbours along. Nor are directions taken away
    that those classes may need.
    """
    if not config.leak.proxy:
        return config
    objective = replace(config.objective, beta=0.0)
    return replace(config, objective=objective, leak=replace(config.leak, proxy=config.leak.unseen, compress=0.0))


def epochs_of(settings: TrainConfig, least_steps: int, epoch_steps: int) -> int:
    """Say how many epochs of so many steps follow the sparse phase, at most."""
    return max(1, round(settings.epochs), -(-least_steps // epoch_steps))


def preset_of(name: str, own: Settings, presets: Mapping[str, Settings]) -> Settings:
    """Give the settings of a preset; "own" = those given."""
    return own if name == "own" else presets[name]


def check_preset(name: str, own: object, usual: object) -> None:
    """Refuse settings that a preset would overrule."""
    if name != "own" and own != usual:
        raise ConfigError(f"erase: settings are given, but preset is {name!r}; set preset to 'own'.")


def check_adapter(rank: int, scale: float, blocks: int, name: str) -> None:
    """Refuse an adapter that is none. Args: blocks: that stay after the sparse phase; 1 where there is none."""
    if rank < 1 or scale <= 0:
        raise ConfigError(f"{name}: rank must be at least 1 and scale above 0; found {rank} and {scale}.")
    if blocks < 1:
        raise ConfigError(f"{name}.blocks: expected at least 1 block to stay after the sparse phase, found {blocks}.")


def check_objective(objective: ObjectiveConfig | DetectorObjectiveConfig, name: str) -> None:
    """Refuse bounds and weights that ask for nothing, or for the contrary."""
    if objective.bound <= 0 or objective.beta < 0 or objective.alpha < 0:
        raise ConfigError(f"{name}.objective: bound must be above 0, beta and alpha at least 0; found {objective}.")


def check_counts(settings: Mapping[str, float], name: str) -> None:
    """Refuse numbers below 0."""
    for key, value in settings.items():
        if value < 0:
            raise ConfigError(f"{name}.{key}: expected 0 or more, found {value}.")


def check_training(settings: TrainConfig, name: str) -> None:
    """Refuse to train a request's adapter by other than whole epochs."""
    if settings.optim.lr <= 0 or settings.batch_size < 1:
        raise ConfigError(
            f"{name}.train: optim.lr must be above 0 and batch_size at least 1; found {settings.optim.lr} and "
            f"{settings.batch_size}"
        )
    if settings.epochs < 1 or settings.epochs % 1 or settings.max_steps:
        raise ConfigError(
            f"{name}.train: expected epochs, a whole number of at least 1, and no max_steps; found {settings.epochs} "
            f"and {settings.max_steps}"
        )


def check_erase(config: EraseConfig, name: str = "erase") -> None:
    """Refuse settings that contradict each other."""
    check_adapter(config.rank, config.scale, config.blocks if config.select_epochs > 0 else 1, name)
    check_objective(config.objective, name)
    check_training(config.train, name)
    counted = ("alpha_from", "select_epochs", "least_steps", "snap", "patience", "floor")
    check_counts({key: vars(config)[key] for key in counted}, name)
    check_leak(config.leak, f"{name}.leak")
