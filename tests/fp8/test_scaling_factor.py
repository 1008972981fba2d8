import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.errors import ArtefactError
from postgrad.fp8.numerics import E4M3, quantize
from postgrad.fp8.scaling_factor import ScalingFactor, ScalingFactorConfig, saturated_share


def shares(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_thousand_clean_steps_double_mu_exactly() -> None:
    factor = ScalingFactor(1)
    assert factor.factors([0]).item() == 1.0
    for _ in range(1000):
        factor.update([0], shares(0.0))
    assert factor.factors([0]).item() == 2.0
    factor.update([0], shares(1.1e-5))
    assert factor.factors([0]).item() == 1.0 and factor.k.tolist() == [0]


def test_only_more_than_the_threshold_halves() -> None:
    factor = ScalingFactor(3)
    factor.update([0, 1, 2], shares(1e-5, 1.1e-5, torch.nan))
    assert factor.k.tolist() == [1, -1000, 0]


@pytest.mark.parametrize(("saturated", "k"), [(1, 1), (2, -1000)])
def test_one_of_a_hundred_thousand_is_not_too_many(saturated: int, k: int) -> None:
    values = torch.zeros(100_000)
    values[:saturated] = 448.0
    factor = ScalingFactor(1)
    factor.update([0], saturated_share(quantize(values, E4M3, torch.ones(())).codes)[None])
    assert factor.k.tolist() == [k]


def test_saturated_codes_are_those_of_the_greatest_numbers_only() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert saturated_share(every).item() == 2 / 256
    assert saturated_share(torch.tensor([0x7E, 0xFE, 0x7F, 0xFF], dtype=torch.uint8).view(every.dtype)).item() == 0.5


def test_factors_move_by_place() -> None:
    factor = ScalingFactor(4)
    factor.update([2, 0], shares(1.0, 0.0))
    assert factor.k.tolist() == [1, 0, -1000, 0]
    torch.testing.assert_close(factor.factors([2, 0]), torch.tensor([0.5, 2**0.001]))


def test_mu_stays_in_its_bounds() -> None:
    factor = ScalingFactor(2, config=ScalingFactorConfig(window=4))
    for _ in range(30):
        factor.update([0, 1], shares(0.0, 1.0))
    assert factor.factors([0, 1]).tolist() == [2.0, 2.0**-20]


def test_it_starts_where_it_is_told() -> None:
    assert ScalingFactor(1, start=-1.5).k.tolist() == [-1500]
    assert ScalingFactor(1, start=-99.0).k.tolist() == [-20_000]


def test_a_resumed_factor_goes_on_alike() -> None:
    first, second = ScalingFactor(2), ScalingFactor(2)
    first.update([0, 1], shares(0.0, 1.0))
    state = first.state_dict()
    second.load_state_dict(state)
    for factor in (first, second):
        factor.update([1], shares(0.0))
    assert first.k.tolist() == second.k.tolist() == [1, -999]
    assert state["k"].tolist() == [1, -1000], "a saved state does not move on"
    with pytest.raises(ArtefactError, match="2 tensors where 3"):
        ScalingFactor(3).load_state_dict(state)


@given(st.integers(-20_000, 1000))
def test_mu_is_two_to_the_k(k: int) -> None:
    factor = ScalingFactor(1)
    factor.load_state_dict({"k": torch.tensor([k])})
    assert factor.factors([0]).item() == pytest.approx(2 ** (k / 1000), rel=1e-7)
