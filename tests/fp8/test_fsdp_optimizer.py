"""AdamW over FSDP2's shards: two and four processes over gloo, against `Fp8AdamW` in one process."""

import pytest
import torch
from fsdp_ranks import MAX_NORM, Found, coded_names, expected_coded, found_by, llama, loss_of, means
from torch import Tensor, nn

from postgrad.errors import ConfigError
from postgrad.fp8.fsdp_optimizer import Fp8ShardAdamW
from postgrad.fp8.gradients import add, take
from postgrad.fp8.numerics import F16, dequantize
from postgrad.fp8.scaled import scale_parameter_

worlds = pytest.mark.parametrize("world", [2, 4])


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def coded(world: int) -> list[Found]:
    return [found["coded"] for found in found_by(world)[0]]


@worlds
def test_the_weights_of_record_are_those_of_one_process_bit_for_bit(world: int) -> None:
    """The shards lie where they should, and every scale is that of the whole tensor."""
    one = expected_coded(world)
    for found in coded(world):
        assert same(found["weights"], one["weights"])
        assert found["norm"] == pytest.approx(float(one["norm"]), rel=1e-12)
        assert found["norm"] > 2 * MAX_NORM


@worlds
def test_all_ranks_multiply_with_the_same_codes(world: int) -> None:
    first, *others = coded(world)
    for found in others:
        for name, (codes, scale) in found["codes"].items():
            assert torch.equal(codes, first["codes"][name][0]) and torch.equal(scale, first["codes"][name][1])


@worlds
def test_six_bytes_a_parameter_over_all_ranks(world: int) -> None:
    ranks = coded(world)
    names, model = coded_names(llama()), llama()
    numel = sum(param.numel() for name, param in model.named_parameters() if name in names)
    assert sum(found["numel"] for found in ranks) == numel
    for found in ranks:
        each = {"weight": 2, "gradient": 1, "exp_avg": 1, "exp_avg_sq": 2}
        assert found["bytes"] == {key: num * found["numel"] for key, num in each.items()}
        assert found["numel"] == pytest.approx(numel / world, rel=0.03)


@worlds
def test_micro_batches_that_are_reduced_one_by_one_add_up_in_codes(world: int) -> None:
    """Each sum is rounded again, with the scale of the whole tensor, as `gradients.add` does in one process."""
    model, sums = llama(), {}
    names = coded_names(model)
    for param in (model.get_parameter(name) for name in names):
        scale_parameter_(param, F16)
    for micro in range(2):
        grads = means(model, [lambda r=rank, m=micro: loss_of(model, 2 * r + m) for rank in range(world)], names)
        for name in names:
            sums[name] = add(sums[name], grads[name]) if micro else take(grads[name])
    for found in found_by(world)[0]:
        assert found["stored"].keys() == names
        for name, (values, amax) in found["stored"].items():
            assert torch.equal(values, dequantize(sums[name].q)) and torch.equal(amax, sums[name].amax), name


@worlds
def test_a_run_that_was_saved_goes_on_as_if_it_had_not_been(world: int) -> None:
    for found in coded(world):
        assert same(found["straight"], found["resumed"])
        assert not same(found["straight"], found["weights"])


@worlds
def test_a_gradient_broken_on_one_rank_is_skipped_by_all(world: int) -> None:
    for found in coded(world):
        assert found["skipped"] == 1
        assert same(found["after broken"], found["straight"])


def test_what_is_not_sharded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 3\) is not sharded"):
        Fp8ShardAdamW([nn.Parameter(torch.ones(2, 3))])
    with pytest.raises(ConfigError, match="betas"):
        Fp8ShardAdamW([nn.Parameter(torch.ones(2, 3))], betas=(0.99, 0.9))
