"""FSDP2 with weights and gradients that travel as bytes: two and four processes over gloo, against one process."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsdp_ranks import (
    Block,
    Found,
    Odd,
    coded_names,
    expected_plain,
    found_by,
    llama,
    loss_of,
    mean_of,
    means,
    odd_input,
)
from torch import Tensor, nn

from postgrad.errors import ConfigError, ModelError
from postgrad.fp8.fsdp import CodesReduceScatter, shard
from postgrad.fp8.linear import LinearConfig, swap_linears
from postgrad.fp8.numerics import E4M3, F16, Quantized, quantize, snr_db
from postgrad.fp8.scaled import ScaledTensor
from postgrad.fp8.sharded import Agreement, ShardedWeight, shard_parameter_

worlds = pytest.mark.parametrize("world", [2, 4])


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def one() -> dict[int, Found]:
    return {world: expected_plain(world) for world in (2, 4)}


@worlds
def test_training_is_that_of_one_process_bit_for_bit(one: dict[int, Found], world: int) -> None:
    """Its losses, its gradients (each rank's rounded once, then added in float32) and its weights of record."""
    ranks, _ = found_by(world)
    for rank, found in enumerate(ranks):
        assert found["plain"]["losses"] == [losses[rank] for losses in one[world]["losses"]]
        for step, grads in zip(found["plain"]["steps"], one[world]["gradients"], strict=True):
            assert same(step["gradients"], grads)
        assert same(found["plain"]["weights"], one[world]["weights"])


@worlds
def test_layers_multiply_with_the_codes_of_the_whole_tensor_on_every_rank(one: dict[int, Found], world: int) -> None:
    for found in found_by(world)[0]:
        assert found["plain"]["codes"].keys() == one[world]["codes"].keys()
        for name, (codes, scale) in found["plain"]["codes"].items():
            whole, its_scale = one[world]["codes"][name]
            assert torch.equal(codes, whole) and torch.equal(scale, its_scale), name


@worlds
def test_gradients_are_30_db_above_what_one_rounding_costs(world: int) -> None:
    """31 dB of a coded weight's gradient against the exact mean; plain ones differ in the order of a sum only."""
    model = llama()
    exact: dict[str, Tensor] = {}
    for rank in range(world):
        model.zero_grad()
        loss_of(model, rank).backward()
        for name, param in model.named_parameters():
            assert param.grad is not None
            exact[name] = exact.get(name, 0) + param.grad.double() / world
    for name, ours in found_by(world)[0][0]["plain"]["steps"][0]["gradients"].items():
        q = Quantized(ours, torch.ones(()), E4M3)
        assert snr_db(exact[name], q) > (30 if name in coded_names(model) else 120), name


def padded(model: nn.Module, world: int, coded: bool) -> int:
    """Elements of what travels, with as many rows for every rank."""
    names = coded_names(llama())
    sizes = [p.shape for name, p in model.named_parameters() if (name in names) == coded]
    return sum(-(-shape[0] // world) * world * shape[1:].numel() for shape in sizes)


@worlds
def test_a_byte_a_parameter_each_way(world: int) -> None:
    """Forward and backward gather blocks twice, the root once; float32 costs four times that, here as a control."""
    model = llama()
    per_rank = (world - 1) / world
    root = {id(p) for name, p in model.named_parameters() if "layers." not in name}
    plain_blocks = sum(p.numel() for n, p in model.named_parameters() if "layers." in n and n not in coded_names(model))
    coded, rest = padded(model, world, True), sum(p.numel() for p in model.parameters() if id(p) in root)
    for found in found_by(world)[0]:
        for step in found["plain"]["steps"]:
            assert step["gathered"] == per_rank * (2 * coded + 2 * 4 * plain_blocks + 4 * rest)
            scales = 4 * len(coded_names(model))
            # The wire counts the codes gathered twice, the reduction of all, and its scales.
            assert step["sent"] == per_rank * (2 * coded + coded + 4 * plain_blocks + 4 * rest) + scales
        control = found["control"]
        assert control["gathered"] == per_rank * 4 * (2 * coded + 2 * plain_blocks + rest)
        assert control["scattered"] == per_rank * 4 * (coded + plain_blocks + rest)


@worlds
def test_micro_batches_are_reduced_once_and_recomputed_activations_change_nothing(world: int) -> None:
    model = llama()
    own = [lambda r=rank: loss_of(model, 2 * r) + loss_of(model, 2 * r + 1) for rank in range(world)]
    grads = means(model, own, coded_names(model))
    for found in found_by(world)[0]:
        assert same(found["accumulated"], found["recomputed"])
        for name, ours in found["accumulated"].items():
            assert snr_db(grads[name], Quantized(ours, torch.ones(()), E4M3)) > 100, name


@worlds
def test_layers_may_compute_in_bfloat16(one: dict[int, Found], world: int) -> None:
    """Gradients are added in float32. Inputs rounded to 16 bits fall on other 8-bit codes here and there: 20 dB."""
    for found in found_by(world)[0]:
        for name, exact in one[world]["gradients"][0].items():
            ours = found["bf16"][name]
            assert ours.dtype == torch.float32
            assert snr_db(exact, Quantized(ours, torch.ones(()), E4M3)) > 15, name


@worlds
def test_odd_shapes(world: int) -> None:
    """Five rows leave a fourth rank none; GPT-2's layers are cut along their inputs; biases travel as they are."""
    model = Odd()
    swap_linears(model, LinearConfig(min_inputs=1, min_outputs=1, multiple=1))
    names = {name for name, p in model.named_parameters() if p.ndim == 2}
    grads = means(model, [lambda r=rank: model(odd_input(r)) for rank in range(world)], names)
    for rank, found in enumerate(found_by(world)[0]):
        assert found["odd"]["whole"]["loss"] == model(odd_input(rank)).item()
        assert same(found["odd"]["whole"]["gradients"], grads)


@worlds
def test_a_layer_without_gradient_leaves_its_neighbours_exact(world: int) -> None:
    model = Odd()
    for block in model.blocks:
        assert isinstance(block, Block)
        block.whole = False
    swap_linears(model, LinearConfig(min_inputs=1, min_outputs=1, multiple=1))
    grads = means(model, [lambda r=rank: model(odd_input(r)) for rank in range(world)], set())
    assert len(grads) == 8
    for found in found_by(world)[0]:
        assert same(found["odd"]["spared"]["gradients"], grads)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_is_read_by_a_program_that_knows_nothing_of_this() -> None:
    """Values, not codes; by one process, of what four have written."""
    ranks, folder = found_by(4)
    state = {"model": {name: torch.zeros_like(param) for name, param in llama(swapped=False).named_parameters()}}
    dcp.load(state, checkpoint_id=folder / "checkpoint", no_dist=True)
    assert same(state["model"], ranks[0]["coded"]["weights"])


def test_ranks_that_agree_lose_one_rounding_only() -> None:
    """Equal gradients on all ranks average to their own codes, exactly."""
    grad = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    q = quantize(grad, E4M3)
    assert torch.equal(mean_of([grad] * 4, coded=True), q.codes.float() / q.scale)
    assert torch.equal(mean_of([grad] * 4, coded=False), grad)


def test_what_is_not_finite_on_one_rank_is_nan_everywhere() -> None:
    grads = [torch.ones(4, 3), torch.ones(4, 3)]
    grads[1][2, 1] = torch.inf
    assert mean_of(grads, coded=True).isnan().all()


def test_a_shard_is_written_through_its_views() -> None:
    param = nn.Parameter(torch.arange(12.0).view(4, 3))
    shard_parameter_(param)
    local = param.data
    assert isinstance(param, ShardedWeight)
    local[1:3].mul_(2)
    torch._foreach_add_([param.detach()], 1)
    assert torch.equal(param.plain(), torch.tensor([[1.0, 2, 3], [7, 9, 11], [13, 15, 17], [10, 11, 12]]))
    assert not param.agreement.fresh


def test_lists_of_codes_are_written_too() -> None:
    weight = ScaledTensor(quantize(torch.ones(3, 2), F16), torch.float32)
    torch._foreach_mul_([weight], 3)
    assert torch.equal(weight + 0, torch.full((3, 2), 3.0))


def test_a_weight_that_is_not_finite_makes_products_nan() -> None:
    agreement = Agreement(torch.device("cpu"))
    agreement.learn(torch.tensor(torch.inf))
    assert agreement.scale.isnan()


def test_models_that_cannot_be_sharded_so_are_refused() -> None:
    with pytest.raises(ModelError, match="swap_linears first"):
        shard(llama(swapped=False))
    model = llama()
    model.lm_head.weight = model.model.layers[0].mlp.gate_proj.weight  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"gate_proj: the weight serves a layer that is not 8-bit"):
        shard(model)
    with pytest.raises(ModelError, match="float64"):
        shard_parameter_(nn.Parameter(torch.ones(2, 2, dtype=torch.float64)))


def test_other_reductions_are_refused() -> None:
    buffer = torch.zeros(4)
    with pytest.raises(ConfigError, match="set_force_sum_reduction_for_comms"):
        CodesReduceScatter([])(buffer, buffer, None, torch.distributed.ReduceOp.MAX)
    CodesReduceScatter([])(buffer, torch.arange(4.0), None, torch.distributed.ReduceOp.SUM)
    assert torch.equal(buffer, torch.arange(4.0))
