"""AdamW in 6 bytes a parameter: FP16 weight of record, FP8 first moment, FP16 second moment, FP8 gradient.

    optimizer = Fp8AdamW(model.parameters(), lr=3e-4)    # weights of two and more axes become 16-bit codes, in place
    optimizer.store_gradients()                          # a backward pass leaves 8-bit codes
    loss.backward(); optimizer.step(max_norm=1.0); optimizer.zero_grad()

Parameters of fewer than two axes (biases, scales of norms) keep full precision. So should embeddings: give them a group
with {"params": [...], "state": "fp32"}. A parameter without gradient is left as it is: no decay, no step counted. If
any gradient is not finite no parameter changes, and the step is counted in `skipped`.

Source:  FP8-LM (arXiv 2310.18313), section 2.2; the formulas are in `postgrad.fp8.adam`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from postgrad.errors import ArtefactError, ConfigError
from postgrad.fp8.adam import (
    BF16,
    F32,
    STATES,
    Held,
    Hyper,
    Moments,
    Scales,
    StateFormats,
    Store,
    noted,
    start,
    step_states,
)
from postgrad.fp8.gradients import Gradient, Gradients, global_norm, take
from postgrad.fp8.numerics import E4M3, E5M2, F16, Format, Quantized, Rounding, dequantize
from postgrad.fp8.scaled import ScaledTensor, scale_parameter_

_FORMATS = {format.name: format for format in (E4M3, E5M2, F16, BF16, F32)}
_SEED_STEP = 1_000_003


class _Work(NamedTuple):
    """A parameter with a gradient, and its place among all parameters."""

    param: Tensor
    group: dict[str, Any]
    gradient: Gradient
    place: int


class Fp8AdamW(Optimizer):
    """AdamW whose states are codes with scales; the parameters it is given become codes too, in place.

    Args:    betas: beta1^2 < beta2 (see `postgrad.fp8.adam`); the paper's by default, as is weight_decay.
             state: a name in STATES or formats; a group may have its own.   scales: "predictive" needs one pass and
             cannot overflow; "jit" looks at the new states first, as the paper does.   rounding: of states and weights;
             "stochastic" draws from torch's initial seed, the step and the parameter's place, so that it resumes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        state: str | StateFormats = "paper",
        scales: Scales = "predictive",
        rounding: Rounding = "nearest",
    ) -> None:
        """Check the settings and turn the parameters into codes."""
        self.gradients = Gradients()
        self.grad_norm = torch.zeros((), dtype=torch.float64)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state": state}
        defaults |= {"scales": scales, "rounding": rounding, "seed": torch.initial_seed() % 2**31, "skipped": 0}
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

    def store_gradients(self) -> None:
        """Let backward passes leave codes instead of `param.grad`, for the parameters kept as codes."""
        for group in self.param_groups:
            coded = [param for param in group["params"] if param.requires_grad and _is_coded(param)]
            self.gradients.attach(coded, _formats(group["state"]).gradient)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, codes too."""
        super().zero_grad(set_to_none)
        self.gradients.clear()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, divide: float = 1.0, max_norm: float = 0.0
    ) -> float | None:
        """Take one step, with gradients divided by a number and cut to a norm of at most `max_norm`; 0 = no cut.

        Both are folded into the gradients' scales. The norm before the cut is left in `grad_norm`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = list(self._work())
        if not work:
            return loss
        if not torch.stack([item.gradient.amax for item in work]).isfinite().all():
            for group in self.param_groups:
                group["skipped"] += 1
            return loss
        self.grad_norm = global_norm(item.gradient.q for item in work) / divide
        norm = self.grad_norm.item()
        cut = max_norm / norm if 0 < max_norm < norm else 1.0
        for item in work:
            self._step_one(item, cut / divide)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states as they are, codes included; the formats must be this optimizer's."""
        self._check_loaded(state_dict)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, param in zip(names, params, strict=True):
            if name in state_dict["state"]:
                self.state[param] = {
                    key: item.detach().to(param.device, copy=True) if isinstance(item, Tensor) else item
                    for key, item in state_dict["state"][name].items()
                }

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

    def _step_one(self, work: _Work, factor: float) -> None:
        """Step one parameter with its gradient times a factor."""
        param, group, state = work.param, work.group, self.state[work.param]
        formats = formats_of(param, group)
        master = _master(param)
        if not state:
            moments = start(dequantize(master.q), formats)
            state["step"] = 0
        else:
            moments = Moments(master, _loaded(state, "exp_avg", formats.m), _loaded(state, "exp_avg_sq", formats.v))
        beta1, beta2 = group["betas"]
        hyper = Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], state["step"] + 1)
        generator = None
        if group["rounding"] == "stochastic":
            seed = (group["seed"] * _SEED_STEP + hyper.step) * _SEED_STEP + work.place
            generator = torch.Generator(param.device).manual_seed(seed % 2**63)
        g = dequantize(work.gradient.q) * factor
        after = step_states(
            moments._replace(master=master), g, hyper, formats, Store(group["scales"], group["rounding"], generator)
        )
        if isinstance(param, ScaledTensor):
            param.store(after.master.q)
        else:
            param.copy_(after.master.q.codes)
        _save(state, "exp_avg", after.m)
        _save(state, "exp_avg_sq", after.v)
        state["step"] = hyper.step

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


def formats_of(param: Tensor, group: dict[str, Any]) -> StateFormats:
    """Return the formats of a parameter: its group's, or full precision where it has fewer than two axes."""
    return _formats(group["state"]) if _is_coded(param) else STATES["fp32"]


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


def _master(param: Tensor) -> Held:
    """Read a parameter and its amax; anyone may have written to it since the last step."""
    if isinstance(param, ScaledTensor):
        return noted(param.quantized)
    return noted(Quantized(param.detach().float(), torch.ones((), device=param.device), F32))


def _save(state: dict[str, Any], key: str, held: Held) -> None:
    state[key], state[f"{key}_scale"], state[f"{key}_amax"] = held.q.codes, held.q.scale, held.amax


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
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and beta1**2 < beta2 < 1):
        raise ConfigError(f"betas must have 0 <= beta1 < 1 and beta1^2 < beta2 < 1; found {(beta1, beta2)}")
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
