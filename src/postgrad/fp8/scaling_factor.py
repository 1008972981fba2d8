"""The factor mu of gradients whose sum is taken in FP8: high enough not to underflow, low enough not to overflow.

Formula: mu = 2^(k / 1000) with an integer k a tensor: k - 1000 where more than 0.001 % of the elements of the sum are
         at FP8's largest magnitude, else k + 1. A clean thousand steps double mu; an overflow halves it at once.
Source:  FP8-LM (arXiv 2310.18313), section 2.1, eq. 3: "mu is set to 1/2", "exponentially increased to 2 over 1,000
         steps".
Differs: read as above, relative to the mu at hand; k is an integer, so that mu comes back to where it was, exactly. It
         stays in [2^-20, 2]. The system as released has a fixed mu.

Letters: P tensors that have a factor, T of them that are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postgrad.errors import ArtefactError
from postgrad.fp8.numerics import power_of_two


@dataclass(frozen=True, kw_only=True)
class ScalingFactorConfig:
    """How mu moves."""

    threshold: float = 1e-5
    """Share of saturated elements above which mu is halved."""
    window: int = 1000
    """Steps without overflow that double mu, > 0."""
    lowest: int = -20
    """mu stays at 2^lowest or above."""
    highest: int = 1
    """mu stays at 2^highest or below."""


class ScalingFactor:
    """The factors of P tensors; the same on all ranks, since all see the same sums. Nothing waits for the device."""

    def __init__(
        self,
        num_tensors: int,
        *,
        config: ScalingFactorConfig | None = None,
        start: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start all factors at 2^start, rounded to a whole k; -log2(N) / 2 is 1 / sqrt(N)."""
        self.config = config = config or ScalingFactorConfig()
        self._k = torch.full((num_tensors,), round(start * config.window), dtype=torch.int64, device=device)
        # Powers of two within an octave, from a table: every device gives the same bits, and a whole octave is exact.
        octave = [2.0 ** (i / config.window) for i in range(config.window)]
        self._octave = torch.tensor(octave, dtype=torch.float32, device=device)
        self._clamp()

    @property
    def k(self) -> Int[Tensor, " P"]:
        """A copy of the exponents, in steps of a window to the octave."""
        return self._k.clone()

    def factors(self, places: Sequence[int]) -> Float[Tensor, " T"]:
        """Return mu of the tensors at these places."""
        k = self._k[list(places)]
        octaves = torch.div(k, self.config.window, rounding_mode="floor")
        return self._octave[k - octaves * self.config.window] * power_of_two(octaves)

    def update(self, places: Sequence[int], shares: Float[Tensor, " T"]) -> None:
        """Move the factors of the tensors at these places after a step.

        Args: shares: saturated elements over all, in float64 so that 1 of 100,000 is 1e-5 exactly; NaN, of a sum that
              was not finite, moves nothing.
        """
        k = self._k[list(places)]
        moved = torch.where(shares > self.config.threshold, k - self.config.window, k + 1)
        self._k[list(places)] = torch.where(shares.isnan(), k, moved)
        self._clamp()

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the exponents."""
        return {"k": self.k}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from these exponents.

        Raises: ArtefactError: they are of another number of tensors.
        """
        if state["k"].shape != self._k.shape:
            raise ArtefactError(
                f"The state holds scaling factors of {state['k'].numel()} tensors where {self._k.numel()} are reduced; "
                "load the state of the same parameters."
            )
        self._k.copy_(state["k"])

    def _clamp(self) -> None:
        self._k.clamp_(self.config.lowest * self.config.window, self.config.highest * self.config.window)


def saturated_share(codes: Tensor) -> Float[Tensor, ""]:
    """Return the share of E4M3 codes 0x7E and 0xFE, which are 448 and -448, in float64; NaN's 0x7F does not count."""
    return (codes.view(torch.uint8) & 0x7F).eq(0x7E).double().mean()
