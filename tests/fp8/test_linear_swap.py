"""The swap of linear layers: transformers' models trained, checkpointed, compiled, saved, restored; refusals."""

import copy
from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from postgrad.errors import ModelError
from postgrad.fp8.linear import Fp8Conv1D, Fp8Linear, LinearConfig, restore_linears, roll_windows, swap_linears

SMALL = LinearConfig(min_inputs=16, min_outputs=16)
DELAYED = LinearConfig(min_inputs=16, min_outputs=16, scaling="delayed", window=2)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, use_cache=False))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False))


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4))


def batch(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": torch.arange(4)}
    tokens = torch.randint(64, (2, 12), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(**batch(model)).loss
    return loss


def trained(model: nn.Module, steps: int = 3) -> list[float]:
    """Train on one batch without dropout; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        roll_windows(model)
        losses.append(loss.item())
    return losses


every_model = pytest.mark.parametrize(("build", "layers"), [(llama, 14), (gpt2, 8), (vit, 12)])


@every_model
@pytest.mark.parametrize("config", [SMALL, DELAYED], ids=["jit", "delayed"])
def test_models_train(build: Callable[[], nn.Module], layers: int, config: LinearConfig) -> None:
    plain, model = build(), build()
    names = swap_linears(model, config)
    assert len(names) == layers and not any("lm_head" in name or "classifier" in name for name in names)
    kinds = {type(model.get_submodule(name)) for name in names}
    assert kinds == {Fp8Conv1D if build is gpt2 else Fp8Linear}
    wanted, found = trained(plain), trained(model)
    assert found[2] < found[0]
    assert all(a == pytest.approx(b, rel=0.03) for a, b in zip(found, wanted, strict=True))
    assert found != wanted, "the swap changed nothing"


@every_model
def test_parameters_names_and_files_stay(build: Callable[[], nn.Module], layers: int) -> None:
    model = build()
    parameters = dict(model.named_parameters())
    saved = copy.deepcopy(model.state_dict())
    before = loss_of(model.eval())
    names = swap_linears(model, DELAYED)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(saved)
    swapped = loss_of(model)
    other = build()
    swap_linears(other, DELAYED)
    nn.init.zeros_(other.get_parameter(f"{names[0]}.weight"))
    other.load_state_dict(saved)
    assert torch.equal(loss_of(other.eval()), swapped)
    plain = build()
    plain.load_state_dict(other.state_dict())
    assert torch.equal(loss_of(plain.eval()), before)
    assert restore_linears(model) == names and len(names) == layers
    assert torch.equal(loss_of(model), before) and list(model.state_dict()) == list(saved)
    assert {type(model.get_submodule(name)) for name in names} == {Conv1D if build is gpt2 else nn.Linear}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("config", [SMALL, DELAYED], ids=["jit", "delayed"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_checkpointing_changes_nothing(config: LinearConfig, half: bool) -> None:
    model, checkpointed = llama(), llama()
    swap_linears(model, config)
    swap_linears(checkpointed, config)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            wanted, found = gradients(model.train()), gradients(checkpointed.train())
        assert equal(found, wanted)
        roll_windows(model)
        roll_windows(checkpointed)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Do without run-time checks of shapes, which the compiler cannot look through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Block(nn.Module):
    """Two layers with a nonlinearity between; one is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), Conv1D(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("config", [SMALL, DELAYED], ids=["jit", "delayed"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_compiling_changes_nothing(config: LinearConfig, half: bool) -> None:
    torch.manual_seed(0)
    block = Block()
    swap_linears(block, config)
    twin = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(4):  # the window is full from the third on
        x = torch.randn(2, 5, 32)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        for run, own in zip((block, compiled), inputs, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = run(own)
            y.float().square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for mine, its in zip(block.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, its.grad)
        for mine, its in zip(block.buffers(), twin.buffers(), strict=True):
            assert torch.equal(mine, its)
        roll_windows(block)
        roll_windows(twin)


def test_attributes_hooks_and_shared_layers_survive() -> None:
    block = nn.ModuleDict({"a": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    block["b"] = block["a"]
    calls = []
    block["a"].note = "mine"
    handle = block["a"].register_forward_hook(lambda *_: calls.append(1))
    block["c"].eval()
    assert swap_linears(block, SMALL) == ["a", "c", "b"]
    assert block["a"] is block["b"] and block["a"].note == "mine"
    assert not block["c"].product.training and block["a"].product.training
    block["a"](torch.randn(2, 16))
    handle.remove()
    block["a"](torch.randn(2, 16))
    assert calls == [1]
    assert restore_linears(block) == ["a", "c", "b"]
    assert block["a"] is block["b"] and type(block["a"]) is nn.Linear
    assert restore_linears(block) == []


def test_patterns_choose_layers() -> None:
    model = llama()
    config = LinearConfig(min_inputs=16, min_outputs=16, take=("model.layers.1.*",), skip=("k_proj", "*_proj.x", "mlp"))
    assert swap_linears(model, config) == [f"model.layers.1.self_attn.{name}_proj" for name in "qvo"]


def test_a_model_on_no_device_is_swapped() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    assert swap_linears(model, DELAYED) == ["0"]
    model.to_empty(device="cpu")
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    assert model(torch.ones(2, 16)).tolist() == [[16.0] * 16] * 2


def test_no_layer_admitted_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"q_proj 32 x 32: below 256 x 256: lower min_inputs.*and 10 more"):
        swap_linears(llama(), LinearConfig())
    with pytest.raises(ModelError, match=r"0 17 x 16: not multiples of 16: lower multiple"):
        swap_linears(nn.Sequential(nn.Linear(17, 16)), SMALL)
    with pytest.raises(ModelError, match=r"from_linear"):
        swap_linears(nn.Linear(16, 16), SMALL)
    with pytest.raises(ModelError, match=r"no nn.Linear"):
        swap_linears(nn.Sequential(nn.ReLU()), SMALL)
    model = nn.Sequential(nn.Linear(16, 16))
    swap_linears(model, SMALL)
    with pytest.raises(ModelError, match=r"swapped already"):
        swap_linears(model, SMALL)


def test_layers_that_would_bypass_the_swap_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].forward = lambda x: x
    with pytest.raises(ModelError, match="a forward of its own"):
        swap_linears(model, SMALL)
    assert type(model[0]) is nn.Linear, "half a swap"
    attention = nn.MultiheadAttention(16, 2)  # reads its out_proj's weight itself
    with pytest.raises(ModelError, match="MultiheadAttention has no"):
        swap_linears(attention, SMALL)


def test_shards_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(16, 16))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ModelError, match="sharded already"):
            swap_linears(model, SMALL)
    finally:
        dist.destroy_process_group()
