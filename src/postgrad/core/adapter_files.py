"""The folder of one low-rank adapter, as peft writes and reads it: adapter_config.json, adapter_model.safetensors.

Differs:   every layer is listed by its full name, and the same adapter gives the same bytes.

Letters: R rank, I inputs, O outputs of a layer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from postgrad.core.files import atomic_path, flush, remove, write_json
from postgrad.errors import ArtefactError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_REFUSED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")
_REFUSED_TOO = ("lora_bias", "trainable_token_indices", "layer_replication")


@dataclass(frozen=True)
class StoredAdapter:
    """A plain LoRA: each layer's weight gets (alpha / rank) B A."""

    rank: int
    alpha: float
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    """Full name of a layer -> A [R, I], B [O, R]."""


def write_adapter(
    folder: Path, adapter: StoredAdapter, *, base: str, excluded: Sequence[str] = (), transposed: bool = False
) -> None:
    """Write an adapter so that `PeftModel.from_pretrained(model, folder)` gives it to these layers and no others.

    Args:
        base: name or folder of the model it belongs to.
        excluded: other layers whose names end like one of these; peft takes a listed name for an ending too.
        transposed: the weights are stored [I, O], as GPT-2's are.
    """
    tensors = {
        f"base_model.model.{key}.lora_{which}.weight": matrix.detach().cpu().contiguous()
        for key, pair in adapter.matrices.items()
        for which, matrix in zip("AB", pair, strict=True)
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, _config(adapter, base, excluded, transposed))
        for file in temporary.iterdir():
            flush(file)
        remove(folder)


def read_adapter(folder: Path) -> StoredAdapter:
    """Read the adapter of a folder, whoever wrote it.

    Raises: ArtefactError: a file is missing or broken, or it is no plain LoRA of linear layers.
    """
    rank, alpha = _read_config(folder)
    return StoredAdapter(rank, alpha, _read_matrices(folder))


def plain_number(value: float) -> float:
    """Write 1 rather than 1.0, as peft does."""
    return int(value) if value == int(value) else value


def _config(adapter: StoredAdapter, base: str, excluded: Sequence[str], transposed: bool) -> dict[str, Any]:
    from peft import LoraConfig

    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=plain_number(adapter.alpha),
        target_modules=list(adapter.matrices),
        exclude_modules=list(excluded) or None,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(settings.items())}


def _read_config(folder: Path) -> tuple[int, float]:
    """Give rank and alpha of a plain LoRA."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder} holds no readable {CONFIG_FILE}: {error}. Export the adapter again") from error
    usual = {"peft_type": ("LORA",), "bias": ("none", None), "r": None, "lora_alpha": None}
    odd = [key for key, values in usual.items() if config.get(key) is None or (values and config[key] not in values)]
    odd += [key for key in (*_REFUSED, *_REFUSED_TOO) if config.get(key)]
    if odd:
        found = {key: config.get(key) for key in odd}
        raise ArtefactError(
            f"{folder}/{CONFIG_FILE}: expected a plain LoRA with r and lora_alpha, found {found}; only such can be read"
        )
    return int(config["r"]), float(config["lora_alpha"])


def _read_matrices(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read layer -> (A, B)."""
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{folder} holds no readable {WEIGHTS_FILE}: {error}. Export the adapter again") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2 or not bool(torch.isfinite(tensor).all()):
            raise ArtefactError(f"{path}: expected finite matrices of linear layers, found {key} {tuple(tensor.shape)}")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found or any(len(pair) < 2 for pair in found.values()):
        raise ArtefactError(f"{path}: expected an A and a B for each layer, found {sorted(tensors)}")
    return {key: (pair["A"], pair["B"]) for key, pair in found.items()}
