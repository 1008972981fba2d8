"""Levels: what each keeps of a parameter, what it leaves alone, and that a model comes back."""

import pytest
import torch
from fp8_training import Small, TokenBatches, next_token
from torch import nn

from postgrad.core.config import OptimConfig, PrecisionConfig
from postgrad.errors import ConfigError, ModelError
from postgrad.fp8.adam import F32
from postgrad.fp8.levels import coded_parameters, prepare, restore
from postgrad.fp8.linear import Fp8Linear
from postgrad.fp8.memory import memory_report
from postgrad.fp8.numerics import E4M3, F16, dequantize, quantize
from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.scaled import ScaledTensor
from postgrad.fp8.zero import ShardedFp8AdamW

SMALL = PrecisionConfig(min_size=16)


def prepared(level: str, **settings: object) -> tuple[nn.Module, Fp8AdamW | ShardedFp8AdamW]:
    return prepare(Small(), OptimConfig(beta2=0.95), level, PrecisionConfig(min_size=16, **settings))  # type: ignore[arg-type]


def one_step(model: nn.Module, optimizer: Fp8AdamW | ShardedFp8AdamW) -> None:
    next_token(model)(TokenBatches()[0][0], 0).sum.backward()  # type: ignore[no-untyped-call]
    optimizer.step(max_norm=1.0)


@pytest.mark.parametrize(("level", "num_bytes"), [("O1", 11), ("O2", 6)])
def test_bytes_a_parameter(level: str, num_bytes: int) -> None:
    """Codes of 2 048 + 2 048 weights: 2 + 1 + (4 + 4 | 1 + 2) bytes; 7 scales and amaxes of 4 bytes a tensor."""
    model, optimizer = prepared(level)
    assert isinstance(optimizer, Fp8AdamW)
    one_step(model, optimizer)
    coded, plain = memory_report(optimizer)
    assert coded.num_elements == 2 * 64 * 32
    found = coded.per_parameter
    assert found["total"] - found["scales"] == num_bytes
    assert found["scales"] <= 8 * 4 * 2 / coded.num_elements
    assert plain.per_parameter["total"] >= 12


def test_o3_computes_on_bytes_and_owns_the_record() -> None:
    model, optimizer = prepared("O3")
    assert isinstance(optimizer, ShardedFp8AdamW)
    one_step(model, optimizer)
    for param in coded_parameters(model):
        assert isinstance(param, ScaledTensor) and param.format == E4M3
        master = optimizer.masters()[param]
        assert isinstance(master, ScaledTensor) and master.format == F16
        again = quantize(dequantize(master.quantized), E4M3)
        assert torch.equal(param.codes.view(torch.uint8), again.codes.view(torch.uint8))
    coded, _ = memory_report(optimizer)
    found = coded.per_parameter
    assert {kind: found[kind] for kind in ("weight", "record", "gradient", "m", "v")} == {
        "weight": 1, "record": 2, "gradient": 1, "m": 1, "v": 2
    }  # fmt: skip


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_only_wide_linear_layers_change_and_all_comes_back(level: str) -> None:
    model, before = Small(), Small()
    _, optimizer = prepare(model, level=level, precision=SMALL)  # type: ignore[arg-type]
    swapped = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    assert swapped == ["up", "down"]
    assert type(model.head) is nn.Linear and not isinstance(model.head.weight, ScaledTensor)
    assert {id(param) for param in coded_parameters(model)} == {id(model.up.weight), id(model.down.weight)}
    restore(model, optimizer)
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    for (name, param), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert type(param) is nn.Parameter and param.dtype == torch.float32 and param.requires_grad, name
        torch.testing.assert_close(param, old, rtol=2**-11, atol=1e-7)
    next_token(model)(TokenBatches()[0][0], 0).sum.backward()  # type: ignore[no-untyped-call]
    assert model.up.weight.grad is not None


def test_o2_and_o3_of_one_rank_are_the_same_bits() -> None:
    models = []
    for level in ("O2", "O3"):
        model, optimizer = prepared(level)
        for step in range(4):
            optimizer.zero_grad()
            next_token(model)(TokenBatches()[step][0], step).sum.backward()  # type: ignore[no-untyped-call]
            optimizer.step(max_norm=0.5)
        restore(model, optimizer)
        models.append(model)
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_groups_decay_matrices_only_and_keep_full_precision_where_it_matters() -> None:
    _, optimizer = prepare(Small(), OptimConfig(weight_decay=0.3), precision=SMALL)
    sizes = [(len(group["params"]), group["weight_decay"], group["state"]["m"]) for group in optimizer.param_groups]
    assert sizes == [(2, 0.3, "E4M3"), (2, 0.3, F32.name), (4, 0.0, F32.name)]


def test_a_frozen_weight_multiplies_in_8_bits_and_is_not_touched() -> None:
    model = Small()
    model.up.weight.requires_grad_(False)
    weight = model.up.weight
    kept = weight.detach().clone()
    _, optimizer = prepare(model, precision=SMALL)
    one_step(model, optimizer)
    assert isinstance(model.up, Fp8Linear) and model.up.weight is weight and torch.equal(weight, kept)


def test_full_products_leave_the_layers_and_code_the_rest() -> None:
    model, optimizer = prepared("O2", products="full")
    assert type(model.get_submodule("up")) is nn.Linear and len(coded_parameters(model)) == 2
    plain = Small()
    for name, param in plain.named_parameters():
        param.data.copy_(model.get_parameter(name))
    tokens = TokenBatches()[0][0]
    assert torch.equal(model(tokens), plain(tokens))
    one_step(model, optimizer)
    assert isinstance(optimizer, Fp8AdamW)
    coded, _ = memory_report(optimizer)
    assert coded.per_parameter["total"] - coded.per_parameter["scales"] == 6
    restore(model, optimizer)
    assert all(type(param) is nn.Parameter for param in model.parameters())
    with pytest.raises(ConfigError, match="products fp8"):
        prepare(Small(), level="O3", precision=PrecisionConfig(min_size=16, products="full"))


def test_refuses_what_it_cannot_train() -> None:
    with pytest.raises(ConfigError, match=r"min_size must be >= 16, .*found 8"):
        prepare(Small(), precision=PrecisionConfig(min_size=8))
    with pytest.raises(ModelError, match="256"):
        prepare(Small())
    frozen = Small().requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter that trains"):
        prepare(frozen, precision=SMALL)
    with pytest.raises(ModelError, match=r"float32 before they become codes; found torch\.bfloat16"):
        prepare(Small().bfloat16(), precision=SMALL)
