"""Load, run, save and fingerprint image classifiers, with the features their last layer reads.

A classifier takes bytes as they lie in memory and prepares them itself, on its device. Its logits stand in the order
of the data's classes: rows of a pretrained head are found by their names, or a new head is drawn from the seed.

Differs:   images go straight to the network's size; a processor that crops after scaling would cut a border off.

Letters: B images, C channels, H height, W width, D features, K classes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.core.files import atomic_path, flush, remove, write_json
from postgrad.core.layer_adapters import base_hashes
from postgrad.core.numbers import full
from postgrad.core.runtime import Job, stage_seed
from postgrad.core.vision_networks import (
    NO_BUILDERS,
    Builder,
    Inputs,
    Made,
    built,
    find_head,
    from_hub,
    is_saved,
    logits_of,
    match_rows,
    replace_head,
    saved,
    tell_classes,
    timm_network,
    tiny_vit,
)
from postgrad.errors import ModelError


class Seen(NamedTuple):
    """What a classifier makes of images."""

    features: Float[Tensor, "B D"]
    """What the head reads."""
    logits: Float[Tensor, "B K"]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Which image classifier."""

    path: str = "tiny"
    """A hub name, a folder, "timm:NAME", or "tiny": a small vision transformer drawn from the seed."""
    width: int = 64
    """Hidden width of a network drawn from the seed."""
    depth: int = 4
    """Its number of blocks."""
    heads: int = 4
    """Its attention heads."""
    patch: int = 2
    """Height and width of its patches, in pixels."""
    size: int = 0
    """Pixels to scale images to, a square; 0 = the pretrained network's own, or as the images are."""
    mean: tuple[float, ...] = ()
    """Taken from pixels of 0 to 1, one for each channel or for all; empty = the network's own, or 0.5."""
    std: tuple[float, ...] = ()
    """What pixels less their mean are divided by; empty = the network's own, or 0.5."""
    head: Literal["match", "position", "new"] = "match"
    """The last layer's rows: found by the classes' names (a new layer where none are known), kept as they stand, or
    drawn anew."""
    pretrained: bool = True
    """Load the weights of a timm model; else draw them from the seed."""


class _Tap:
    """Hears what the head is given during a call, and then forgets it; no cycle through it keeps a network alive."""

    def __init__(self) -> None:
        self.heard: list[Tensor] | None = None

    def __call__(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if self.heard is not None:  # the head may also be called by itself
            self.heard.append(given[0])


class Classifier(nn.Module):
    """A network, how its images are prepared, and its last layer.

    Args:    head_name: dotted name in the network of the layer whose output the logits are.
             classes: what the logits stand for.   size: height and width the network wants.
             mean, std: one number, or one for each channel.   channels: what the network wants; 0 = any.
             settings: of a network that is not from transformers, what its builder makes it from.
    """

    mean_of_channels: Tensor
    std_of_channels: Tensor

    def __init__(
        self,
        network: nn.Module,
        head_name: str,
        classes: Sequence[str],
        *,
        size: tuple[int, int],
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        channels: int = 0,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.network = network
        self.head_name = head_name
        self.classes = tuple(classes)
        self.size, self.channels = size, channels
        self.mean, self.std = tuple(mean), tuple(std)
        self.settings = dict(settings)
        # Not part of the state: they are settings.
        self.register_buffer("mean_of_channels", torch.tensor(self.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_of_channels", torch.tensor(self.std).view(-1, 1, 1), persistent=False)
        self._tap = _Tap()
        self.head().register_forward_pre_hook(self._tap)

    def head(self) -> nn.Module:
        """Return the layer that turns features into logits."""
        return self.network.get_submodule(self.head_name)

    def pixels(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """Prepare images: scale, resize, repeat grey, normalise."""
        pixels = images.float() / 255
        if pixels.shape[2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
        if self.channels > 1 and pixels.shape[1] == 1:
            pixels = pixels.expand(-1, self.channels, -1, -1)
        pixels = (pixels - self.mean_of_channels) / self.std_of_channels  # [B, c, h, w]
        return pixels.to(next(self.network.parameters()).dtype)

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> Seen:
        """Return features and logits, in float32 where the network computes in less."""
        heard: list[Tensor] = []
        self._tap.heard = heard
        try:
            logits = logits_of(self.network, self.pixels(images))
        finally:
            self._tap.heard = None
        assert len(heard) == 1, (
            f"{self.head_name} was called {len(heard)} times; was it replaced? Make a new classifier"
        )
        return Seen(full(heard[0]), full(logits))


def load_classifier(
    config: ClassifierConfig,
    classes: Sequence[str],
    image_shape: tuple[int, int, int],
    job: Job,
    *,
    frozen: bool = False,
    builders: Mapping[str, Builder] = NO_BUILDERS,
) -> Classifier:
    """Load a classifier, or draw one from the seed, for images of some classes.

    Weights are float32 when they train and the run's dtype when frozen.

    Args:    classes: of the data, in the order of its labels; empty = the model's own.
             image_shape: channels, height and width of the data.
             builders: for kinds of network of the caller's own, by their name; the name is also a path that draws one.
    Raises:  ModelError: no such model, or one that does not fit the images or the classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_seed(job.seed, "classifier"))
        made = _make(config, tuple(classes), image_shape, builders)
    if frozen and made.missing:
        raise ModelError(
            f"{config.path}: expected all weights of a frozen classifier, found none for {sorted(made.missing)[:3]}."
        )
    inputs = _as_asked(made.inputs, config, image_shape)
    network = made.network.to(job.dtype if frozen else torch.float32)
    head_name = find_head(network, inputs, config.path)
    if any(name.startswith(f"{head_name}.") for name in made.missing):
        rows = None
    else:
        rows = _rows(made.labels, tuple(classes), config, frozen)
    named = tuple(classes) or made.labels
    if rows is None or rows != list(range(len(made.labels))):
        replace_head(network, head_name, rows, len(named), stage_seed(job.seed, "classifier head"))
    if isinstance(network, PreTrainedModel):
        tell_classes(network, named)
    classifier = Classifier(
        network, head_name, named, size=inputs.size, mean=inputs.mean, std=inputs.std, channels=inputs.channels,
        settings=made.settings,
    )  # fmt: skip
    if frozen:
        classifier.requires_grad_(False)
    placed: Classifier = classifier.train(not frozen).to(job.device)
    return placed


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write a folder that `load_classifier` reads, atomically: save_pretrained's, or config.json and safetensors.

    timm models are written in timm's own format, which timm and transformers load, too.

    Raises:  ModelError: adapters are in the network, or nothing says how to make it again.
    """
    network: Any = classifier.network
    if any(".base_layer." in name for name in network.state_dict()):
        raise ModelError("expected a network without adapters to save, found some; export, merge or drop them first.")
    settings = {**classifier.settings, "num_classes": len(classifier.classes), "label_names": list(classifier.classes)}
    if not isinstance(network, PreTrainedModel) and "kind" not in settings:
        raise ModelError(
            f"expected a network with a kind in its settings, found {type(network).__name__} without; load it through "
            "a builder of load_classifier."
        )
    mean, std = (
        list(values) * (max(1, classifier.channels) // len(values)) for values in (classifier.mean, classifier.std)
    )
    inputs = {"image_mean": mean, "image_std": std}
    height, width = classifier.size
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        if isinstance(network, PreTrainedModel):
            network.save_pretrained(temporary)
            steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
            processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
            write_json(temporary / "preprocessor_config.json", processor | steps | inputs | {"rescale_factor": 1 / 255})
        else:
            save_model(network, str(temporary / "model.safetensors"))
            shape = {"size": [height, width], "channels": classifier.channels}
            if settings["kind"] == "timm":
                own = {"mean": mean, "std": std, "input_size": [classifier.channels, height, width]}
                settings["pretrained_cfg"] = settings["pretrained_cfg"] | own
            write_json(temporary / "config.json", settings | shape | inputs)
        for file in temporary.iterdir():
            flush(file)
        remove(folder)


def classifier_hash(classifier: Classifier) -> dict[str, str]:
    """Hash every tensor of the network under its name there: sha256 of dtype, shape and bytes, in hex.

    Adapters are left out: the hashes are those of the base. Names are those of the installed release of transformers;
    a saved file may keep older ones.
    """

    return base_hashes(classifier.network)


def _make(
    config: ClassifierConfig,
    classes: tuple[str, ...],
    image_shape: tuple[int, int, int],
    builders: Mapping[str, Builder],
) -> Made:
    """Draw or load the network that a path means."""
    path = config.path
    if path == "tiny" or path in builders:
        if not classes:
            raise ModelError(f"{path}: a network drawn from the seed needs classes to tell apart, found none.")
        size = (config.size, config.size) if config.size else image_shape[1:]
        shape = {"width": config.width, "depth": config.depth, "heads": config.heads, "patch": config.patch}
        settings = {"kind": path, "channels": image_shape[0], "size": list(size), **shape}
        return tiny_vit(settings, classes) if path == "tiny" else built(builders[path], settings, classes)
    if path.startswith("timm:"):
        return timm_network(path.removeprefix("timm:"), config.pretrained, config.size, classes)
    return saved(path, builders) if is_saved(path) else from_hub(path, image_shape)


def _as_asked(inputs: Inputs, config: ClassifierConfig, image_shape: tuple[int, int, int]) -> Inputs:
    """Put the settings asked for in place of the network's own; refuse what does not fit its channels."""
    asked = Inputs(
        size=(config.size, config.size) if config.size else inputs.size,
        channels=inputs.channels,
        mean=config.mean or inputs.mean,
        std=config.std or inputs.std,
    )
    for name, values in (("mean", asked.mean), ("std", asked.std)):
        if len(values) not in (1, asked.channels):
            raise ModelError(f"{config.path}: expected 1 or {asked.channels} values of {name}, found {values}.")
    if image_shape[0] not in (1, asked.channels):
        raise ModelError(
            f"{config.path}: the network takes {asked.channels} channels, the images have {image_shape[0]}. Use grey "
            "images or a network for colour."
        )
    return asked


def _rows(
    labels: tuple[str, ...], classes: tuple[str, ...], config: ClassifierConfig, frozen: bool
) -> list[int] | None:
    """Choose the rows of a pretrained head, or None for a new one."""
    every = list(range(len(labels)))
    if not classes or (config.head != "new" and classes == labels):
        return every
    rows = match_rows(labels, classes) if config.head == "match" else None
    if rows is None and config.head != "new" and len(labels) == len(classes):
        if config.head == "position" or all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
            return every
        raise ModelError(
            f"{config.path}: its {len(labels)} classes ({', '.join(labels[:3])}, ...) have other names than the data's "
            f"({', '.join(classes[:3])}, ...). Set head to position if they mean the same in this order, else to new."
        )
    if rows is None and (frozen or config.head == "position"):
        raise ModelError(
            f"{config.path}: expected a head for the data's {len(classes)} classes ({', '.join(classes[:3])}, ...), "
            f"found one of {len(labels)} ({', '.join(labels[:3])}, ...). Finetune the model on this data first."
        )
    return rows
