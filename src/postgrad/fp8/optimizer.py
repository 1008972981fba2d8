"""AdamW in 6 bytes a parameter: FP16 weight of record, FP8 first moment, FP16 second moment, FP8 gradient.

    optimizer = Fp8AdamW(model.parameters(), lr=3e-4)    # weights of two and more axes become 16-bit codes, in place
    optimizer.store_gradients()                          # a backward pass leaves 8-bit codes
    loss.backward(); optimizer.step(max_norm=1.0); optimizer.zero_grad()

Parameters of fewer than two axes (biases, scales of norms) keep full precision. So should embeddings: give them a group
with {"params": [...], "state": "fp32"}. A parameter without gradient is left as it is: no decay, no step counted. If
any gradient is not finite no parameter changes, and the step is counted in `skipped`.

States, codes and scales are written in place. Every back end gives the same bits, but for "compile" on a GPU, whose
compiler may fuse a product with a sum.

Source:  FP8-LM (arXiv 2310.18313), section 2.2; the formulas are in `postgrad.fp8.adam`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from postgrad.errors import ArtefactError, ConfigError
from postgrad.fp8.adam import (
    BF16,
    F32,
    STATES,
    Gradient,
    Held,
    Moments,
    Scales,
    StateFormats,
    Store,
    check_betas,
    full,
    hyper_of,
    needs_scale,
    noted,
    start,
)
from postgrad.fp8.fused import Backend, Item, check_backend, choose, fused_norm, step_items
from postgrad.fp8.gradients import Gradients, global_norm, take
from postgrad.fp8.numerics import E4M3, E5M2, F16, Format, Quantized, Rounding
from postgrad.fp8.scaled import ScaledTensor, scale_parameter_

_FORMATS = {format.name: format for format in (E4M3, E5M2, F16, BF16, F32)}
_SEED_STEP = 1_000_003


class _Work(NamedTuple):
    """A parameter with a gradient, and its place among all parameters."""

    param: Tensor
    group: dict[str, Any]
    gradient: Gradient
    place: int


class Storing(TypedDict, total=False):
    """How states are stored, and by which back end."""

    scales: Scales
    rounding: Rounding
    backend: Backend
    max_norm: float


class _Known(NamedTuple):
    """The amax of a weight's codes, as long as nobody writes to them; writes through `.data` go unseen."""

    codes: Tensor
    versions: tuple[int, int, int]
    amax: Tensor

    def holds(self, param: ScaledTensor) -> bool:
        """Say whether the weight is as it was."""
        return self.codes is param.codes and self.versions == _versions(param)


class Fp8AdamW(Optimizer):
    """AdamW whose states are codes with scales; the parameters it is given become codes too, in place.

    Args:    betas: beta1^2 < beta2 (see `postgrad.fp8.adam`); the paper's by default, as is weight_decay.
             state: a name in STATES or formats; a group may have its own.   scales: "predictive" needs one pass and
             cannot overflow; "jit" looks at the new states first, as the paper does.   rounding: of states and weights,
             "nearest" by default; "stochastic" draws from torch's initial seed, the step and the parameter's place, so
             that it resumes.   backend: "auto" is "triton" on CUDA where Triton is installed, else "torch"; "compile"
             is torch.compile of "torch". It is no part of a checkpoint.   max_norm: what gradients are cut to where
             `step` does not say; 0, the default, = no cut.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        state: str | StateFormats = "paper",
        **storing: Unpack[Storing],
    ) -> None:
        """Check the settings and turn the parameters into codes."""
        if unknown := set(storing) - set(Storing.__annotations__):
            raise ConfigError(f"Fp8AdamW has no setting {', '.join(sorted(unknown))}")
        self.backend = storing.get("backend", "auto")
        check_backend(self.backend)
        self.max_norm = storing.get("max_norm", 0.0)
        self.gradients = Gradients()
        self.grad_norm = torch.zeros((), dtype=torch.float64)
        self._known: dict[Tensor, _Known] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state": state}
        defaults |= {"scales": storing.get("scales", "predictive"), "rounding": storing.get("rounding", "nearest")}
        defaults |= {"seed": torch.initial_seed() % 2**31, "skipped": 0}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its weights become codes of the group's master format."""
        given = param_group.get("state", self.defaults["state"])
        formats = _formats(given)
        super().add_param_group(param_group | {"state": _spelled(formats)})
        group = self.param_groups[-1]
        _check(group)
        for param in group["params"]:
            _prepare(param, formats.master)

    @property
    def skipped(self) -> int:
        """Steps that were not taken because a gradient was not finite."""
        return int(self.param_groups[0]["skipped"])

    def step_of(self, param: Tensor) -> int:
        """Return how many steps a parameter has taken."""
        return int(self.state.get(param, {}).get("step", 0))

    def moments_of(self, param: Tensor, group: dict[str, Any]) -> Moments:
        """Return a parameter of a group and its moments as they are stored, not copies; 0 before the first step."""
        state, formats, master = self.state.get(param, {}), formats_of(param, group), self._master(param)
        if not state:
            return start(master, formats)
        return Moments(master, _loaded(state, "exp_avg", formats.m), _loaded(state, "exp_avg_sq", formats.v))

    def store_gradients(self) -> None:
        """Let backward passes leave codes instead of `param.grad`, for the parameters whose gradients have few bits."""
        for group in self.param_groups:
            format = _formats(group["state"]).gradient
            coded = [param for param in group["params"] if param.requires_grad and _is_coded(param)]
            self.gradients.attach(coded if needs_scale(format) else [], format)

    @torch.no_grad()
    def norm(self) -> Float[Tensor, ""]:
        """Return the norm of all gradients as one vector, in float64; NaN where one is not finite."""
        return self._norm([item.gradient for item in self._work()])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, codes too."""
        super().zero_grad(set_to_none)
        self.gradients.clear()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        divide: float = 1.0,
        max_norm: float | None = None,
        norm: Tensor | None = None,
    ) -> float | None:
        """Take one step, with gradients divided by a number and cut to a norm of at most `max_norm`; 0 = no cut.

        None stands for the optimizer's own. Both are folded into the gradients' scales. The norm after the division,
        before the cut, is left in `grad_norm`. The host waits for the device once, for the norm.

        Args: norm: of all gradients before the division, if it is known already, over all ranks for example; a step
              is skipped too where it is not finite.
        """
        loss = loss_of(closure)
        work = list(self._work())
        if not work:
            return loss
        norm = self._norm([item.gradient for item in work], norm) / divide
        value = norm.item()
        if not math.isfinite(value):
            for group in self.param_groups:
                group["skipped"] += 1
            return loss
        self.grad_norm = norm
        limit = self.max_norm if max_norm is None else max_norm
        cut = limit / value if 0 < limit < value else 1.0
        self._take(work, cut / divide, choose(self.backend, work[0].param.device))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states as they are, codes included; the formats must be this optimizer's."""
        self._check_loaded(state_dict)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, param in zip(names, params, strict=True):
            if name in state_dict["state"]:
                self.state[param] = copies(state_dict["state"][name], param.device)

    def _work(self) -> Iterator[_Work]:
        """Find the parameters that have a gradient."""
        place = 0
        for group in self.param_groups:
            for param in group["params"]:
                gradient = self.gradients.of(param)
                if gradient is None and param.grad is not None:
                    gradient = take(param.grad, formats_of(param, group).gradient)
                if gradient is not None:
                    yield _Work(param, group, gradient, place)
                place += 1

    def _norm(self, gradients: list[Gradient], norm: Tensor | None = None) -> Float[Tensor, ""]:
        """Return the norm, known or measured, and NaN where a gradient is not finite."""
        if not gradients:
            return torch.zeros((), dtype=torch.float64)
        amaxes = torch.stack([gradient.amax for gradient in gradients])
        if norm is None:
            fused = choose(self.backend, amaxes.device) == "triton"
            norm = (fused_norm if fused else global_norm)(gradient.q for gradient in gradients)
        return torch.where(amaxes.isfinite().all(), norm.to(amaxes.device), math.nan)

    def _take(self, work: list[_Work], factor: float, backend: Backend) -> None:
        """Step all parameters and keep what that leaves."""
        items = [self._item(one, factor, compiled=backend == "compile") for one in work]
        for one, item, after in zip(work, items, step_items(items, backend), strict=True):
            self._keep(one.param, after)
            self.state[one.param]["step"] = item.hyper.step

    def _item(self, work: _Work, factor: float, *, compiled: bool) -> Item:
        """Gather what the step of one parameter needs."""
        param, group = work.param, work.group
        hyper = hyper_of(group, self.step_of(param) + 1)
        seed = (group["seed"] * _SEED_STEP + hyper.step) * _SEED_STEP + work.place
        store = Store(group["scales"], group["rounding"], seed % 2**63, compiled)
        guard = formats_of(param, group).guard
        return Item(self.moments_of(param, group), work.gradient, hyper, factor, guard, store)

    def _master(self, param: Tensor) -> Held:
        """Read a parameter and its amax, which is measured anew where anyone has written to it since the last step."""
        if not isinstance(param, ScaledTensor):
            return full(param)
        known = self._known.get(param)
        if known is not None and known.holds(param):
            return Held(param.quantized, known.amax)
        return noted(param.quantized)

    def _keep(self, param: Tensor, after: Moments) -> None:
        """Keep what a step has left; codes that were written in place are there already."""
        state, master = self.state[param], after.master
        if isinstance(param, ScaledTensor):
            param.scale.copy_(master.q.scale)
            self._known[param] = _Known(param.codes, _versions(param), master.amax)
        elif master.q.codes.data_ptr() != param.data_ptr():
            param.copy_(master.q.codes)
        for key, held in (("exp_avg", after.m), ("exp_avg_sq", after.v)):
            state[key], state[f"{key}_scale"], state[f"{key}_amax"] = held.q.codes, held.q.scale, held.amax

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Refuse states of other formats or shapes before anything is taken over."""
        for i, (own, group) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if group.get("state") != own["state"]:
                raise ArtefactError(
                    f"group {i} of the optimizer has formats {own['state']}; the states to load have "
                    f"{group.get('state', 'none: another optimizer wrote them')}; make the optimizer with those"
                )
            for param, name in zip(own["params"], group["params"], strict=False):
                formats = formats_of(param, own)
                state = state_dict["state"].get(name, {})
                for key, format in (("exp_avg", formats.m), ("exp_avg_sq", formats.v)) if state else ():
                    _check_codes(state.get(key), param, format, f"{key} of parameter {name}")


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """Compute the loss anew with gradients, where an optimizer's step is asked to."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def copies(entries: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors of a parameter's state to a device, as they are."""
    return {
        key: item.detach().to(device, copy=True) if isinstance(item, Tensor) else item for key, item in entries.items()
    }


def formats_of(param: Tensor, group: dict[str, Any]) -> StateFormats:
    """Return the formats of a parameter: its group's, or full precision where it has fewer than two axes."""
    return _formats(group["state"]) if _is_coded(param) else STATES["fp32"]


def _versions(param: ScaledTensor) -> tuple[int, int, int]:
    """Count the writes to a weight: as an ordinary tensor, and to what it is made of."""
    return param._version, param.codes._version, param.scale._version


def _is_coded(param: Tensor) -> bool:
    return param.ndim >= 2


def _prepare(param: Parameter, format: Format) -> None:
    """Turn a parameter of two and more axes into codes of a format, unless it holds such codes already."""
    held = param.format if isinstance(param, ScaledTensor) else F32
    if not _is_coded(param) or held == format:
        return
    if format == F32:
        raise ConfigError(f"a weight {tuple(param.shape)} holds {held.name} codes; full precision needs a plain one")
    scale_parameter_(param, format)


def _loaded(state: dict[str, Any], key: str, format: Format) -> Held:
    return Held(Quantized(state[key], state[f"{key}_scale"], format), state[f"{key}_amax"])


def _formats(state: str | StateFormats | dict[str, Any]) -> StateFormats:
    """Return formats by name, as they are, or as a group spells them."""
    if isinstance(state, StateFormats):
        return state
    if isinstance(state, dict):
        named = {key: _FORMATS[state[key]] for key in ("master", "m", "v", "gradient")}
        return StateFormats(**named, guard=state["guard"])
    if state not in STATES:
        raise ConfigError(f"state must be one of {', '.join(STATES)} or StateFormats; found {state!r}")
    return STATES[state]


def _spelled(formats: StateFormats) -> dict[str, Any]:
    """Spell formats in strings, which a checkpoint can hold."""
    names = {"master": formats.master, "m": formats.m, "v": formats.v, "gradient": formats.gradient}
    return {key: format.name for key, format in names.items()} | {"guard": formats.guard}


def _check(group: dict[str, Any]) -> None:
    """Refuse settings that cannot work."""
    check_betas(group["betas"])
    for key in ("lr", "eps", "weight_decay"):
        if not group[key] >= 0:
            raise ConfigError(f"{key} must be >= 0; found {group[key]}")
    for key, known in (("scales", ("predictive", "jit")), ("rounding", ("nearest", "stochastic"))):
        if group[key] not in known:
            raise ConfigError(f"{key} must be one of {', '.join(known)}; found {group[key]!r}")


def _check_codes(codes: object, param: Parameter, format: Format, what: str) -> None:
    """Refuse a state tensor of another format or shape."""
    if not isinstance(codes, Tensor) or codes.dtype != format.dtype or codes.shape != param.shape:
        found = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else "nothing"
        raise ArtefactError(f"{what} must be {format.dtype} {tuple(param.shape)}; found {found}")
