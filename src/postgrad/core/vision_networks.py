"""Make the networks of image classifiers: drawn from the seed, from transformers, from timm, from saved folders.

Letters: B images, C channels, H height, W width, K classes.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers import logging as hf_logging
from transformers.image_processing_base import ImageProcessingMixin

from postgrad.errors import ModelError

Builder = Callable[[Mapping[str, Any]], nn.Module]
"""Makes a network from settings: kind, num_classes, channels, size (height, width), width, depth, heads, patch; or from
what a saved folder's config.json says, which is these and more."""
NO_BUILDERS: Mapping[str, Builder] = MappingProxyType({})
HEAD_SPREAD = 0.02
"""Standard deviation of a new head's weights."""
TINY_SPREAD = 0.1
"""Largest standard deviation of the tiny network's first weights; at the usual 0.02, made for wide networks, it knows
94 % of held-out digits after 15 epochs instead of 97 %."""


@dataclass(frozen=True)
class Inputs:
    """What a network wants of its images."""

    size: tuple[int, int]
    """Height and width."""
    channels: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


@dataclass(frozen=True, eq=False)
class Made:
    """A network and what came with it."""

    network: nn.Module
    labels: tuple[str, ...]
    """What the rows of its head stand for; LABEL_0, LABEL_1 and so on where nothing says."""
    inputs: Inputs
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What a builder makes it from; empty for a transformers model."""
    missing: frozenset[str] = frozenset()
    """Tensors that no file held: they were drawn."""


def logits_of(network: Any, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "... K"]:
    """Run a network of transformers, or one that returns its logits: one row an image, unless hooks put in others."""
    logits: Tensor = network(pixel_values=pixels).logits if isinstance(network, PreTrainedModel) else network(pixels)
    return logits


@torch.no_grad()
def find_head(network: nn.Module, inputs: Inputs, place: str) -> str:
    """Name the layer whose output the logits are and that reads one vector an image; the last linear one of several.

    Raises:  ModelError: there is none, as where logits are a mean of two heads; or the network refuses the images.
    """
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if given and isinstance(given[0], Tensor) and given[0].ndim == 2 and isinstance(output, Tensor):
                outputs[name] = output

        return keep

    handles = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    shape = (2, inputs.channels, *inputs.size)
    images = torch.linspace(-1, 1, 2 * inputs.channels * inputs.size[0] * inputs.size[1]).reshape(shape)
    was_training = network.training
    try:
        logits = logits_of(network.eval(), images.to(next(network.parameters()).dtype))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            f"{place}: the network does not take images of {inputs.channels} channels and {inputs.size[0]}x"
            f"{inputs.size[1]} pixels: {error}. Set size to what it was made for."
        ) from error
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    hits = [name for name, output in outputs.items() if output.shape == logits.shape and torch.equal(output, logits)]
    linear = [name for name in hits if isinstance(network.get_submodule(name), nn.Linear)]
    if not hits:
        raise ModelError(
            f"{place}: expected a last layer whose output the logits are, found none in {type(network).__name__}. "
            "Models that average two heads or classify by a convolution cannot be used."
        )
    return (linear or hits)[-1]


def match_rows(labels: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Find the row of each class among a head's labels, by name or by one of a label's names between commas.

    Case, underscores and hyphens do not matter. None when a class has no row, or more than one.
    """
    whole: dict[str, list[int]] = {}
    part: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        whole.setdefault(_plain(label), []).append(row)
        for name in set(map(_plain, label.split(","))):
            part.setdefault(name, []).append(row)
    found = [whole.get(_plain(name)) or part.get(_plain(name)) or [] for name in classes]
    rows = [hits[0] for hits in found if len(hits) == 1]
    return rows if len(set(rows)) == len(classes) else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def replace_head(network: nn.Module, name: str, rows: list[int] | None, num: int, seed: int) -> None:
    """Keep some rows of the head, in this order, or draw a new one."""
    old = network.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise ModelError(f"expected a linear layer to take classes from, found {type(old).__name__} {name}.")
    kept = old.weight.device
    new = nn.Linear(old.in_features, num, bias=old.bias is not None, dtype=old.weight.dtype, device="meta")
    new = new.to_empty(device=kept)  # elsewhere than on meta it would have drawn from the global generator
    with torch.no_grad():
        if rows is None:
            noise = torch.randn(new.weight.shape, generator=torch.Generator().manual_seed(seed))
            new.weight.copy_(noise * HEAD_SPREAD)
        else:
            new.weight.copy_(old.weight[rows])
        if new.bias is not None:
            new.bias.copy_(old.bias[rows] if rows is not None else torch.zeros(num))
    network.set_submodule(name, new)


def tiny_vit(settings: Mapping[str, Any], classes: tuple[str, ...]) -> Made:
    """Draw a small ViT; no dropout."""
    (height, width), patch = settings["size"], settings["patch"]
    if height % patch or width % patch:
        raise ModelError(f"tiny: expected images of a multiple of patch = {patch} pixels, found {height}x{width}.")
    if settings["width"] % settings["heads"]:
        raise ModelError(f"tiny: expected a width that heads = {settings['heads']} divide, found {settings['width']}.")
    config = ViTConfig(
        hidden_size=settings["width"], num_hidden_layers=settings["depth"], num_attention_heads=settings["heads"],
        intermediate_size=4 * settings["width"], image_size=[height, width], patch_size=patch,
        num_channels=settings["channels"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=min(TINY_SPREAD, settings["width"] ** -0.5),
    )  # fmt: skip
    config.id2label = dict(enumerate(classes))
    return Made(ViTForImageClassification(config), classes, Inputs((height, width), settings["channels"]))


def built(builder: Builder, settings: Mapping[str, Any], classes: tuple[str, ...]) -> Made:
    """Draw a network of the caller's own."""
    settings = {**settings, "num_classes": len(classes)}
    height, width = settings["size"]
    return Made(builder(settings), classes, Inputs((height, width), settings["channels"]), settings)


def tell_classes(network: PreTrainedModel, classes: tuple[str, ...]) -> None:
    """Write the classes into a transformers model's config."""
    network.config.id2label = dict(enumerate(classes))
    network.config.label2id = {name: number for number, name in enumerate(classes)}
    network.num_labels = len(classes)


def from_hub(path: str, image_shape: tuple[int, int, int]) -> Made:
    """Load a transformers image classifier by hub name or folder: safetensors only, no code from the hub."""
    with explained(path), _hushed():
        network, loading = AutoModelForImageClassification.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    labels = tuple(str(network.config.id2label[row]) for row in sorted(network.config.id2label))
    return Made(network, labels, _inputs(path, network, image_shape), missing=frozenset(loading["missing_keys"]))


def _inputs(path: str, network: PreTrainedModel, image_shape: tuple[int, int, int]) -> Inputs:
    """Read what the images are to be like from the processor's file, else from the model's config."""
    config = network.config.to_dict()
    config = {**config.get("vision_config", {}), **config}
    channels = int(config.get("num_channels") or 3)
    try:
        known, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:  # there is none
        known = {}
    size = known.get("crop_size") if known.get("do_center_crop") else known.get("size")
    size = size or config.get("image_size") or image_shape[1:]
    if not known.get("do_normalize", True):
        return Inputs(_pair(size), channels, (0.0,), (1.0,))
    # The file's numbers are for pixels times its factor, ours for pixels / 255.
    factor = 255 * float(known.get("rescale_factor", 1 / 255)) if known.get("do_rescale", True) else 255.0
    mean = tuple(value / factor for value in _numbers(known.get("image_mean", 0.5), channels))
    std = tuple(value / factor for value in _numbers(known.get("image_std", 0.5), channels))
    return Inputs(_pair(size), channels, mean, std)


def _pair(size: Any) -> tuple[int, int]:
    """Read a height and a width in any of the ways processors write them."""
    if isinstance(size, Mapping):
        side = size.get("shortest_edge") or size.get("longest_edge") or 0
        return int(size.get("height", side)), int(size.get("width", side))
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _numbers(values: Any, channels: int) -> tuple[float, ...]:
    """Read a number for each channel; a grey network takes the mean of three."""
    many = tuple(float(value) for value in values) if isinstance(values, list | tuple) else (float(values),)
    return many if len(many) in (1, channels) or channels != 1 else (sum(many) / len(many),)


def timm_network(name: str, pretrained: bool, size: int, classes: tuple[str, ...]) -> Made:
    """Make a timm model; without weights, or without a head of its own, it is drawn for the classes."""
    create = _timm()
    arguments: dict[str, Any] = {"img_size": size} if size else {}
    if not pretrained and classes:
        arguments["num_classes"] = len(classes)
    with explained(f"timm:{name}"):
        try:
            network = create(name, pretrained=pretrained, **arguments)
        except TypeError:  # a network for images of any size has no such argument
            arguments.pop("img_size", None)
            network = create(name, pretrained=pretrained, **arguments)
    known = dict(network.pretrained_cfg)
    missing: frozenset[str] = frozenset()
    if pretrained and not network.num_classes:
        network.reset_classifier(len(classes))
        missing = frozenset(f"{known['classifier']}.{part}" for part in ("weight", "bias"))
    labels = classes if not pretrained and classes else _timm_labels(network.num_classes, known)
    channels, height, width = known["input_size"]
    side = (size, size) if size else (int(height), int(width))
    kept = {key: known[key] for key in ("architecture", "mean", "std", "classifier") if key in known}
    settings = {
        "kind": "timm",
        "architecture": known.get("architecture", name),
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {**kept, "input_size": [int(channels), *side]},
    }
    return Made(network, labels, Inputs(side, int(channels), known["mean"], known["std"]), settings, missing)


def _timm() -> Callable[..., Any]:
    try:
        from timm import create_model
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise ModelError(f"models of timm need it installed: pip install timm ({error})") from error
    made: Callable[..., Any] = create_model
    return made


def _timm_labels(num: int, known: Mapping[str, Any]) -> tuple[str, ...]:
    """Name a timm model's rows: by its own labels, by ImageNet's, or by their numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = known.get("label_names")
    if isinstance(names, list | tuple) and len(names) == num:
        return tuple(map(str, names))
    subset = infer_imagenet_subset({"num_classes": num})
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else tuple(f"LABEL_{i}" for i in range(num))


def is_saved(path: str) -> bool:
    """Say whether a folder is one of ours rather than one of transformers."""
    file = Path(path) / "config.json"
    return file.is_file() and "kind" in _read(file)


def saved(path: str, builders: Mapping[str, Builder]) -> Made:
    """Load a folder of a network that is not from transformers."""
    settings = _read(Path(path) / "config.json")
    kind = settings["kind"]
    with explained(path):
        if kind == "timm":
            network = _timm()(settings["architecture"], num_classes=settings["num_classes"], **settings["model_args"])
        elif kind in builders:
            network = builders[kind](settings)
        else:
            raise ModelError(f"{path}: expected a kind among {', '.join(('timm', *builders))}, found {kind!r}.")
        load_model(network, Path(path) / "model.safetensors")
        inputs = Inputs(
            _pair(settings["size"]),
            int(settings["channels"]),
            tuple(settings["image_mean"]),
            tuple(settings["image_std"]),
        )
        return Made(network, tuple(settings["label_names"]), inputs, settings)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: expected JSON: {error}") from error
    return value if isinstance(value, dict) else {}


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Say what to do when a model cannot be loaded."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load {path!r}: {first} Give a hub name you can reach or a folder with config.json and "
            "model.safetensors."
        ) from error


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep transformers from reporting that a new head is new."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
