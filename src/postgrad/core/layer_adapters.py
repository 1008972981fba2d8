"""Low-rank adapters on exactly named linear layers: several at once, summed, revoked bit for bit, pruned by layer.

Formula:   ``y = W x + sum_n (alpha_n / R_n) B_n A_n x`` over the active adapters n.
Source:    Hu et al. 2021 (arXiv 2106.09685); the layers and the files are peft's own.
Differs:   no wrapper around the network and no default adapter. Nothing is merged in place, so that dropping an adapter
           gives back the outputs bit for bit; `bake` alone writes to the base. A layer that loses its last adapter is
           the base's own module again. An exported folder lists the layers that survived, and no others.

Letters: R rank, I inputs, O outputs of a layer.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from postgrad.core.adapter_files import StoredAdapter, plain_number, read_adapter, write_adapter
from postgrad.errors import ArtefactError, ModelError

REINITIAL_GAIN = math.sqrt(6 / 51)
"""Gain of a later task's A, 0.342997: what Kaiming's uniform draw with a = sqrt(50) amounts to; a first task has 1."""
_STACK, _BAKED = "adapter_stack", "baked_adapters"


@dataclass(frozen=True)
class _Stack:
    """What a network's layers cannot say: adapters without a layer left, and the order of the sum."""

    shapes: Mapping[str, tuple[int, float]]
    """Name -> rank, alpha; in the order of arrival."""
    active: tuple[str, ...] = ()
    trainable: str = ""


def linear_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Name a network's linear layers, GPT-2's transposed ones included; one with adapters counts once, as it did."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, nn.Module] = {}
    inside: str | None = None
    for name, module in network.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, nn.Linear | Conv1D | LoraLayer):
            found[name] = module
            inside = f"{name}."
    return found


def adapter_names(network: nn.Module) -> tuple[str, ...]:
    """Name the adapters of a network in the order they came, those without a layer left included."""
    return tuple(_stack(network).shapes)


def active_names(network: nn.Module) -> tuple[str, ...]:
    """Name the adapters that are summed, in order."""
    return _stack(network).active


def inject(network: nn.Module, name: str, linears: Sequence[str], *, rank: int, alpha: float) -> None:
    """Add an adapter to these linear layers, B = 0, and freeze the base; `activate` puts it to work.

    Raises: ModelError: the name is taken or cannot be one, or a layer is not there.
    """
    stack = _stack(network)
    _check_new(network, name, linears, rank)
    _add(network, name, linears, rank, alpha)
    vars(network)[_STACK] = replace(stack, shapes={**stack.shapes, name: (rank, alpha)})
    initialise(network, name, seed=0)
    activate(network, stack.active, stack.trainable)


def initialise(network: nn.Module, name: str, *, seed: int, gain: float = 1.0) -> None:
    """Draw A from U(-b, b) with b = gain / sqrt(I), and set B to 0.

    A layer's draw depends on the seed and on its own name, so it is the same whatever other layers there are.
    """
    for layer, (a, b) in pairs(network, name).items():
        key = hashlib.sha256(f"{seed} {layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        bound = gain / math.sqrt(a.shape[1])
        drawn = torch.empty(a.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            a.copy_(drawn)
            b.zero_()


def pairs(network: nn.Module, name: str) -> dict[str, tuple[Parameter, Parameter]]:
    """Give an adapter's matrices by layer: A [R, I] and B [O, R]."""
    _known(network, [name])
    return {key: (layer.lora_A[name].weight, layer.lora_B[name].weight) for key, layer in _layers(network, name)}


def activate(network: nn.Module, names: Sequence[str], trainable: str = "") -> None:
    """Sum these adapters, in this order; freeze the base and every adapter but `trainable`.

    Raises: ModelError: an adapter is not there or twice there, or `trainable` is none of them.
    """
    _known(network, names)
    if len(set(names)) < len(names) or (trainable and trainable not in names):
        raise ModelError(
            f"expected adapters that differ, with the trainable one among them; found {list(names)} and {trainable!r}"
        )
    for _, layer in _layers(network):
        layer.set_adapter(list(names))
    network.requires_grad_(False)
    if trainable:
        for pair in pairs(network, trainable).values():
            for matrix in pair:
                matrix.requires_grad_(True)
    vars(network)[_STACK] = replace(_stack(network), active=tuple(names), trainable=trainable)


def prune(network: nn.Module, name: str, linears: Sequence[str]) -> None:
    """Take an adapter off these layers; the outputs are unchanged where its B was 0.

    Raises: ModelError: the adapter is not on one of them.
    """
    _known(network, [name])
    layers = dict(_layers(network, name))
    if unknown := [key for key in linears if key not in layers]:
        raise ModelError(f"adapter {name!r} is not on {unknown}; it is on {listed(layers)}")
    for key in dict.fromkeys(linears):
        layer = layers[key]
        others = [other for other in layer.lora_A if other != name]
        layer.set_adapter(others)  # peft would choose another one, and warn
        layer.delete_adapter(name)
        if not others:
            network.set_submodule(key, layer.base_layer)
    stack = _stack(network)
    activate(network, stack.active, stack.trainable)


def drop(network: nn.Module, name: str) -> None:
    """Take an adapter out altogether; without adapters the network is the base's modules again."""
    stack = _stack(network)
    prune(network, name, list(pairs(network, name)))
    shapes = {key: shape for key, shape in stack.shapes.items() if key != name}
    active = tuple(key for key in stack.active if key != name)
    vars(network)[_STACK] = _Stack(shapes)
    activate(network, active, stack.trainable if stack.trainable != name else "")


def delta(network: nn.Module, name: str) -> dict[str, Tensor]:
    """Give what an adapter adds to each weight, (alpha / R) B A, laid out as the weight is."""
    _known(network, [name])
    with torch.no_grad():
        return {key: layer.get_delta_weight(name) for key, layer in _layers(network, name)}


def baked(network: nn.Module) -> dict[str, str]:
    """Give the adapters written into the base: name -> fingerprint. A transformers model keeps them in its config."""
    holder = network.config if isinstance(network, PreTrainedModel) else network
    return dict(vars(holder).get(_BAKED, {}))


def bake(network: nn.Module, names: Sequence[str]) -> None:
    """Write W + the sum of these adapters into the base and take them out; this cannot be undone.

    Raises:
        ArtefactError: one of them is in the base already.
        ModelError: one is not there, or a weight would not be finite.
    """
    before = baked(network)
    if twice := [name for name in names if name in before]:
        raise ArtefactError(f"{twice} are in the base already: baking them again would add them twice")
    _known(network, names)
    marks = {name: fingerprint(network, name) for name in names}
    for name, mark in marks.items():
        _refuse_baked(network, name, mark)
    written = _baked_weights(network, names)
    with torch.no_grad():
        for key, layer in _layers(network):
            if key in written:
                layer.base_layer.weight.copy_(written[key])
    for name in marks:
        drop(network, name)
    holder = network.config if isinstance(network, PreTrainedModel) else network
    vars(holder)[_BAKED] = {**before, **marks}


def fingerprint(network: nn.Module, name: str) -> str:
    """Hash what an adapter computes with: the names of its layers, its scaling, and the bytes of A and B."""
    _known(network, [name])
    matrices = {
        f"{key}.{m}": matrix for key, pair in pairs(network, name).items() for m, matrix in zip("AB", pair, strict=True)
    }
    rank, alpha = _stack(network).shapes[name]
    return hash_tensors(matrices, f"{rank} {float(alpha)!r}")


def hash_tensors(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Hash names, types, shapes and bytes of tensors, and a text about them; their order does not matter."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """Give the state dict the network would have without adapters: the same names, the same tensors."""
    wrapped = [f"{key}." for key, _ in _layers(network)]
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        prefix = next((key for key in wrapped if name.startswith(key)), None)
        if prefix is None:
            state[name] = tensor
        elif name.startswith(f"{prefix}base_layer."):
            state[prefix + name.removeprefix(f"{prefix}base_layer.")] = tensor
    return state


def base_hashes(network: nn.Module) -> dict[str, str]:
    """Hash every tensor of the base under its name: sha256 of dtype, shape and bytes, in hex; adapters are left out."""

    def one(tensor: Tensor) -> str:
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    state = base_state(network)
    with ThreadPoolExecutor() as pool:  # hashing lets the other threads run
        return dict(zip(state, pool.map(one, state.values()), strict=True))


def export_adapter(network: nn.Module, name: str, folder: Path, *, base: str) -> None:
    """Write an adapter as peft does, with the layers it is still on listed one by one.

    Args: base: the model's name or folder, for `PeftModel.from_pretrained`.
    Raises: ArtefactError: no layer is left.
    """
    matrices = pairs(network, name)
    if not matrices:
        raise ArtefactError(f"adapter {name!r} has no layer left, so there is nothing to write: all were pruned")
    rank, alpha = _stack(network).shapes[name]
    endings = tuple(f".{key}" for key in matrices)
    alike = [key for key in linear_layers(network) if key.endswith(endings) and key not in matrices]
    stored = StoredAdapter(rank, alpha, matrices)
    write_adapter(folder, stored, base=base, excluded=alike, transposed=_transposed(network, list(matrices)))


def import_adapter(network: nn.Module, folder: Path, name: str) -> None:
    """Add the adapter of a folder under this name, not yet active; only the layers it has matrices for get it.

    Raises: ArtefactError: it is no plain LoRA, does not fit the network, or is in the base already.
    """
    stored = read_adapter(folder)
    layers = linear_layers(network)
    if missing := [key for key in stored.matrices if key not in layers]:
        raise ArtefactError(
            f"{folder} adapts {listed(missing)}, which this network does not have; it has {listed(layers)}"
        )
    inject(network, name, list(stored.matrices), rank=stored.rank, alpha=stored.alpha)
    try:
        _fill(network, name, stored, folder)
        _refuse_baked(network, name, fingerprint(network, name))
    except ArtefactError:
        drop(network, name)
        raise


def _stack(network: nn.Module) -> _Stack:
    found: _Stack = vars(network).get(_STACK, _Stack({}))
    return found


def _layers(network: nn.Module, name: str = "") -> list[tuple[str, Any]]:
    """List the layers that have adapters, or this adapter, in the network's order."""
    from peft.tuners.lora import LoraLayer

    found = [(key, module) for key, module in network.named_modules() if isinstance(module, LoraLayer)]
    return [(key, module) for key, module in found if not name or name in module.lora_A]


def _known(network: nn.Module, names: Sequence[str]) -> None:
    known = adapter_names(network)
    if unknown := [name for name in names if name not in known]:
        raise ModelError(f"no adapter named {unknown}; the network has {list(known)}. Inject or import it first")


def _check_new(network: nn.Module, name: str, linears: Sequence[str], rank: int) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in dir(nn.ModuleDict):
        raise ModelError(f"expected an adapter's name of letters, digits, - and _, found {name!r}; choose another")
    if name in adapter_names(network):
        raise ModelError(f"the network has an adapter named {name!r} already; drop it first, or choose another name")
    layers = linear_layers(network)
    missing = [key for key in linears if key not in layers]
    if missing or not linears:
        raise ModelError(f"expected linear layers for adapter {name!r}, found {missing}; there are {listed(layers)}")
    if rank < 1:
        raise ModelError(f"expected a rank of 1 or more for adapter {name!r}, found {rank}")


def _add(network: nn.Module, name: str, linears: Sequence[str], rank: int, alpha: float) -> None:
    """Have peft put the pairs in place, parent by parent.

    So names match exactly, and nothing is asked of the network as a whole: some of transformers' detectors do not
    answer peft's question for their input embeddings.
    """
    from peft import LoraConfig, inject_adapter_in_model

    transposed = _transposed(network, linears)
    children: dict[str, list[str]] = {}
    for key in linears:
        parent, _, child = key.rpartition(".")
        children.setdefault(parent, []).append(child)
    for parent, names in children.items():
        settings = LoraConfig(
            r=rank,
            lora_alpha=plain_number(alpha),
            target_modules="|".join(map(re.escape, names)),
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=transposed,
        )
        module = network.get_submodule(parent)
        with torch.random.fork_rng(devices=[]):  # peft's first draw is replaced by ours
            inject_adapter_in_model(settings, module, name)
        del vars(module)["peft_config"]  # the next injection would warn of it
    placed = dict(_layers(network, name))
    for layer in placed.values():
        if layer.lora_A[name].weight.dtype.itemsize < 4:  # steps of training would be lost in half precision
            layer.lora_A[name].float()
            layer.lora_B[name].float()
    assert placed.keys() == set(linears), f"peft adapted {sorted(placed)}, not {list(linears)}"


def _transposed(network: nn.Module, linears: Sequence[str]) -> bool:
    """Say whether the weights of these layers are stored [I, O]."""
    from peft.tuners.lora import LoraLayer

    layers = [linear_layers(network)[key] for key in linears]
    kinds = {isinstance(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer, Conv1D) for layer in layers}
    if len(kinds) > 1:
        raise ModelError(f"some of {listed(linears)} are Conv1D and some are not; give each kind an adapter of its own")
    return kinds.pop()


def _baked_weights(network: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Compute the new weights of the layers concerned; nothing is written yet."""
    weights = {key: layer.base_layer.weight.detach() for key, layer in _layers(network)}
    sums: dict[str, Tensor] = {}
    for name in names:
        for key, added in delta(network, name).items():
            sums[key] = sums.get(key, weights[key]) + added
    broken = [key for key, weight in sums.items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise ModelError(
            f"baking {list(names)} would leave weights that are not finite in {broken}; nothing was written"
        )
    return sums


def _refuse_baked(network: nn.Module, name: str, mark: str) -> None:
    if twin := [other for other, found in baked(network).items() if found == mark]:
        raise ArtefactError(
            f"adapter {name!r} is in the base already, baked as {twin[0]!r}: with it the network would have it twice"
        )


def _fill(network: nn.Module, name: str, stored: StoredAdapter, folder: Path) -> None:
    """Copy the matrices of a folder into an adapter."""
    for key, own in pairs(network, name).items():
        for which, target, tensor in zip("AB", own, stored.matrices[key], strict=True):
            if tensor.shape != target.shape:
                raise ArtefactError(
                    f"{folder}: {which} of {key}: expected shape {tuple(target.shape)} with r = {stored.rank}, found "
                    f"{tuple(tensor.shape)}; the adapter belongs to another model"
                )
            with torch.no_grad():
                target.copy_(tensor)


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Write names with their numbers as N, each once: short enough to read."""
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names)) or "none"
