import math

import pytest
import torch
from fp8_ranks import rank_tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from postgrad.errors import ConfigError
from postgrad.fp8 import reduction
from postgrad.fp8.collectives import Ask, Steps, chain_sum, run, simulate
from postgrad.fp8.numerics import (
    E4M3,
    Quantized,
    amax_of,
    dequantize,
    quantize,
    scale_for,
    share_saturated,
    share_underflown,
    snr_db,
)
from postgrad.fp8.partition import greedy_partition, owner_steps
from postgrad.fp8.reduction import (
    all_reduce,
    amaxes_of,
    mean_steps,
    native_steps,
    segments_of,
    share_size,
    simulate_all_reduce,
)
from postgrad.fp8.scaling_factor import ScalingFactor

NUM = 60_000
WORLDS = (2, 3, 4, 8)


def draws(world: int, sigma: float, num: int = NUM, seed: int = 17) -> list[Tensor]:
    """Gaussian gradients of each rank, times magnitudes that the ranks share."""
    noise = torch.Generator().manual_seed(seed)
    spread = torch.exp(sigma * torch.randn(num, generator=noise))
    return [torch.randn(num, generator=noise) * spread for _ in range(world)]


def mean(ranks: list[Tensor]) -> Tensor:
    return torch.stack(ranks).double().mean(0).float()


def reduced(ranks: list[Tensor], mode: str = "a2a", start: float = 0.0) -> Quantized:
    factor = ScalingFactor(1, start=start) if mode == "native" else None
    return simulate_all_reduce([[x] for x in ranks], mode=mode, factor=factor)[0]


@pytest.mark.parametrize(("sigma", "least"), [(0.0, 27.5), (1.0, 27.5), (1.5, 27.0)])
def test_two_roundings_whatever_the_number_of_ranks(sigma: float, least: float) -> None:
    """Signal and noise are pooled over draws: with sigma 1.5 the rounding of a few great elements moves one draw's
    ratio by 1.5 dB either way."""
    found = []
    for world in range(2, 9):
        pairs = [(mean(ranks), reduced(ranks)) for ranks in (draws(world, sigma, seed=seed) for seed in range(5))]
        lost = [exact.double() - dequantize(q) for exact, q in pairs]
        ratio = norm([exact for exact, _ in pairs]) / norm(lost)
        found.append(20 * math.log10(ratio))
    assert min(found) >= least, found
    assert sigma > 1 or max(found) - min(found) < 1, found


def norm(tensors: list[Tensor]) -> float:
    return torch.cat(tensors).double().norm().item()


@pytest.mark.parametrize(("sigma", "most_lost"), [(0.0, 1e-3), (1.0, 1e-3), (1.5, 0.02)])
@pytest.mark.parametrize("world", WORLDS)
def test_little_is_lost_to_zero_and_nothing_is_cut_off(sigma: float, most_lost: float, world: int) -> None:
    """Either rounding; where the ranks' codes cancel, their mean is 0 before its own, which is no underflow."""
    ranks = draws(world, sigma)
    q = reduced(ranks)
    scale = scale_for(amaxes_of(ranks).max(), E4M3)
    assert max(share_underflown(x, quantize(x, E4M3, scale)).item() for x in ranks) < most_lost
    parts = greedy_partition([NUM], world)
    between = simulate([owner_steps([x], parts, rank, world) for rank, x in enumerate(ranks)])[0][0]
    assert share_underflown(between, q).item() < most_lost
    assert amax_of(between) * q.scale <= E4M3.largest and amaxes_of(ranks).max() * scale <= E4M3.largest


def test_sums_in_fp8_lose_with_every_rank() -> None:
    found = {}
    for world in (2, 8, 64):
        ranks = draws(world, 1.0, num=20_000)
        q = reduced(ranks, "native", start=-math.log2(world) / 2)
        found[world] = snr_db(mean(ranks), q).item()
    assert found[2] > found[8] > found[64] + 5, found
    assert found[64] == pytest.approx(16.0, abs=1.5)
    assert snr_db(mean(ranks), reduced(ranks)).item() > found[64] + 11


def test_sums_in_fp8_overflow_without_a_factor() -> None:
    """Aligned ranks: the sum of the greatest elements is N times what the scale allows for."""
    x = torch.linspace(-1, 1, 1001)
    factor = ScalingFactor(1)
    q = simulate_all_reduce([[x]] * 4, mode="native", factor=factor)[0]
    assert share_saturated(q).item() > 0.3 and factor.k.tolist() == [-1000]
    simulate_all_reduce([[x]] * 4, mode="native", factor=factor)
    q = simulate_all_reduce([[x]] * 4, mode="native", factor=factor)[0]
    torch.testing.assert_close(dequantize(q), x, rtol=0.13, atol=2e-3)


def test_the_sum_of_codes_is_ncclss() -> None:
    rows = [torch.tensor(codes, dtype=torch.uint8).view(E4M3.dtype) for codes in ([0x4A, 0x58], [0x50, 0x5C])]
    assert chain_sum(rows).view(torch.uint8).tolist() == [0x55, 0x62]  # 5 + 8, 16 + 24
    large = torch.tensor([448.0, -448.0, torch.nan]).to(E4M3.dtype)
    assert chain_sum([large, large]).float()[:2].tolist() == [448.0, -448.0] and chain_sum([large, large]).isnan()[2]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_agree_and_sizes_do_not_matter(world: int) -> None:
    inputs = [rank_tensors(rank) for rank in range(world)]
    ranks = simulate([mean_steps(tensors, rank, world) for rank, tensors in enumerate(inputs)])
    mu = torch.full((len(inputs[0]),), 0.5)
    native = simulate([native_steps(tensors, mu, rank, world) for rank, tensors in enumerate(inputs)])
    for found in (ranks, [means for means, _ in native]):
        for q, first, tensor in (
            (q, a, x) for rank in found for q, a, x in zip(rank, found[0], inputs[0], strict=True)
        ):
            assert torch.equal(q.codes.view(torch.uint8), first.codes.view(torch.uint8))
            assert torch.equal(q.scale, first.scale) and q.codes.shape == tensor.shape
    for i, q in enumerate(ranks[0]):
        exact = torch.stack([tensors[i].float() for tensors in inputs]).mean(0)
        largest = max(amax_of(tensors[i]).item() for tensors in inputs)
        assert (dequantize(q) - exact).abs().le(exact.abs() * 0.07 + largest * 0.07).all()


def test_each_tensor_is_reduced_as_if_alone() -> None:
    inputs = [rank_tensors(rank) for rank in range(3)]
    together = simulate_all_reduce(inputs)
    for i, q in enumerate(together):
        alone = simulate_all_reduce([[tensors[i]] for tensors in inputs])[0]
        assert torch.equal(dequantize(q), dequantize(alone))


def test_alone_a_second_rounding_changes_nothing() -> None:
    x = torch.cat([torch.tensor([224.4]), torch.randn(1000)])
    q = all_reduce([x])[0]
    assert torch.equal(dequantize(q), dequantize(quantize(x, E4M3)))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_shares_cover_every_element_once(numels: list[int], world: int) -> None:
    share = share_size(numels, world)
    covered = [0] * len(numels)
    for rank in range(world):
        place = 0
        for segment in segments_of(numels, share, rank):
            assert segment.start >= place and segment.stop <= share
            covered[segment.tensor] += segment.stop - segment.start
            place = segment.stop
    assert covered == numels


@pytest.mark.parametrize("mode", ["a2a", "native"])
def test_extremes_stay_finite(mode: str) -> None:
    huge, tiny = torch.full((3,), 3e38), torch.full((3,), 1e-38)
    factors = ScalingFactor(2, start=-2)
    means = simulate_all_reduce([[huge, tiny]] * 4, mode=mode, factor=factors if mode == "native" else None)
    torch.testing.assert_close(dequantize(means[0]), huge, rtol=0.07, atol=0)
    torch.testing.assert_close(dequantize(means[1]), tiny, rtol=0.07, atol=0)


def test_native_asks_for_its_factor() -> None:
    with pytest.raises(ConfigError, match="scaling factor"):
        all_reduce([torch.ones(2)], mode="native")


def test_a_backend_that_adds_fp8_gives_what_the_chain_gives() -> None:
    inputs = [rank_tensors(rank) for rank in range(3)]
    mu = torch.full((len(inputs[0]),), 0.5)
    chain = simulate([native_steps(tensors, mu, rank, 3) for rank, tensors in enumerate(inputs)])[0]
    fused = simulate([native_steps(tensors, mu, rank, 3, fused=True) for rank, tensors in enumerate(inputs)])[0]
    assert all(torch.equal(dequantize(a), dequantize(b)) for a, b in zip(chain[0], fused[0], strict=True))
    assert torch.equal(chain[1].nan_to_num(7), fused[1].nan_to_num(7))  # NaN of the tensor without elements


def test_steps_without_a_collective_just_return() -> None:
    def steps(asks: int) -> Steps[int]:
        for _ in range(asks):
            yield Ask("max", torch.ones(1))
        return asks

    assert run(steps(0)) == 0 and run(steps(2)) == 2 and simulate([steps(0), steps(0)]) == [0, 0]
    with pytest.raises(AssertionError, match="same collectives"):
        simulate([steps(0), steps(1)])


@pytest.mark.parametrize(("nccl", "capability", "good"), [((2, 24), (9, 0), True), ((2, 21), (9, 0), False)])
def test_a_backend_too_old_for_fp8_is_refused(
    monkeypatch: pytest.MonkeyPatch, nccl: tuple[int, int], capability: tuple[int, int], good: bool
) -> None:
    monkeypatch.setattr(reduction.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(reduction.dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert not reduction._adds_fp8(torch.device("cpu"), None)
    if good:
        assert reduction._adds_fp8(torch.device("cuda"), None)
    else:
        with pytest.raises(ConfigError, match=r"NCCL \(2, 21\) .* mode \"a2a\""):
            reduction._adds_fp8(torch.device("cuda"), None)
