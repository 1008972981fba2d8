"""Which of a classifier's weights train."""

from typing import Literal

from torch import nn

from postgrad.core.vision_models import Classifier
from postgrad.errors import ConfigError
from postgrad.forgetting.blocks import ffn_blocks

Trains = Literal["all", "body", "lower", "last"]
"""Everything; everything but the head; what comes before the upper half of the blocks; the last blocks and what comes
after them, the head included. Before and after is by the order in which the network lists its parameters."""


def part_names(classifier: Classifier, trains: Trains, last_blocks: int = 1) -> tuple[str, ...]:
    """Name the parameters of a part of the classifier.

    Raises: ConfigError: there are fewer blocks than asked for.   ModelError: no blocks are found, where they matter.
    """
    names = [name for name, _ in classifier.named_parameters()]
    match trains:
        case "all":
            return tuple(names)
        case "body":
            head = set(map(id, classifier.head().parameters()))
            return tuple(name for name, param in classifier.named_parameters() if id(param) not in head)
        case "lower":
            blocks = _blocks(classifier)
            return tuple(names[: _first(names, blocks[len(blocks) // 2])])
        case "last":
            blocks = _blocks(classifier)
            if not 1 <= last_blocks <= len(blocks):
                raise ConfigError(
                    f"last_blocks: expected 1 to {len(blocks)}, the network's blocks, found {last_blocks}."
                )
            return tuple(names[_first(names, blocks[-last_blocks]) :])


def middle_block(classifier: Classifier) -> str:
    """Name the last block of the lower half, as it is called in the network."""
    blocks = _blocks(classifier)
    if len(blocks) < 2:
        raise ConfigError("expected a network of at least two blocks to halve, found one.")
    return blocks[len(blocks) // 2 - 1]


def train_only(module: nn.Module, names: tuple[str, ...]) -> None:
    """Let these parameters train and no others."""
    wanted = set(names)
    for name, param in module.named_parameters():
        param.requires_grad_(name in wanted)


def _blocks(classifier: Classifier) -> list[str]:
    return [block.name for block in ffn_blocks(classifier.network)]


def _first(names: list[str], block: str) -> int:
    """Find the first parameter of a block of the network."""
    return next(place for place, name in enumerate(names) if name.startswith(f"network.{block}."))
