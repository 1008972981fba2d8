"""AdamW over FSDP2's shards: each rank keeps and steps 6 / N bytes of a parameter, gradient included.

    swap_linears(model, LinearConfig())
    shard(model, master=F16)
    optimizer = Fp8ShardAdamW(model.parameters(), lr=3e-4)
    optimizer.store_gradients()
    loss.backward(); optimizer.step(); optimizer.zero_grad()

Weights that travel as codes have the paper's states; all other parameters have full precision. Scales are those of
whole tensors: amaxes of the weights and of both moments meet in one MAX after each step, those of the gradients in one
for each layer as the layer's are added. So a step gives each rank its part of what `Fp8AdamW` makes, in one process, of
the same gradients, bit for bit; only a cut by norm may differ in the last bits of the norm, whose squares are added in
another order. The weights' scale for the next gather comes out of the same MAX: `refresh_scales` is not needed.

Source:  FP8-LM (arXiv 2310.18313), sections 2.2 and 2.3; the formulas are in `postgrad.fp8.adam`.
Differs: tensors are cut evenly, where the paper deals them out whole; see `postgrad.fp8.fsdp`. Scales are predictive
         and states rounded to nearest: other choices are not offered here.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from postgrad.errors import ArtefactError, ConfigError
from postgrad.fp8.adam import F32, STATES, Gradient, Held, Moments, Store, check_betas, full, hyper_of, start
from postgrad.fp8.collectives import Wire, over_ranks
from postgrad.fp8.fsdp import like_shard, local_shard, shard_group
from postgrad.fp8.fused import Backend, Item, check_backend, choose, step_items
from postgrad.fp8.gradients import global_norm, take
from postgrad.fp8.numerics import E4M3, F16, Quantized, amax_of, dequantize, quantize, scale_for
from postgrad.fp8.optimizer import loss_of
from postgrad.fp8.sharded import ShardedWeight, agree

_KEYS = (("exp_avg", 1), ("exp_avg_sq", 2))
_FULL, _PAPER = STATES["fp32"], STATES["paper"]


class _Work(NamedTuple):
    """A parameter with a gradient: what this rank holds of it, and the shard if it travels as codes."""

    param: Tensor
    group: dict[str, Any]
    local: Tensor
    shard: ShardedWeight | None
    gradient: Gradient


class Fp8ShardAdamW(Optimizer):
    """AdamW whose states are codes with scales, on a model that `postgrad.fp8.fsdp.shard` has sharded.

    Args:    betas: beta1^2 < beta2 (see `postgrad.fp8.adam`); the paper's by default, as is weight_decay.
             backend: of the step, as in `Fp8AdamW`.   wire: counts what ranks tell each other.
    Raises:  ConfigError: a parameter is not sharded, or a weight of record is not in F16 codes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        backend: Backend = "auto",
        wire: Wire | None = None,
    ) -> None:
        """Check the settings and the parameters."""
        check_backend(backend)
        check_betas(betas)
        self.backend, self.wire = backend, wire
        self.grad_norm = torch.zeros((), dtype=torch.float64)
        self._held: dict[Tensor, Gradient] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "skipped": 0})
        for param in self._params():
            shard = local_shard(param)
            if not isinstance(param, DTensor):
                raise ConfigError(
                    f"a parameter {tuple(param.shape)} is not sharded: call shard(model, master=F16) first"
                )
            if shard is not None and shard.format != F16:
                raise ConfigError(
                    f"a weight of record {tuple(param.shape)} is {shard.format.name}: shard with master=F16"
                )

    @property
    def skipped(self) -> int:
        """Steps that were not taken because a gradient was not finite on some rank."""
        return int(self.param_groups[0]["skipped"])

    def store_gradients(self) -> None:
        """Let backward passes leave 8-bit codes of the shards' gradients instead of `param.grad`.

        Micro-batches that are reduced one by one are added in float32 and rounded again, with a MAX for each tensor.
        """
        for param in self._params():
            shard = local_shard(param)
            if shard is not None and param.requires_grad:
                shard.agreement.wants_gradient_amax = True
                param.register_post_accumulate_grad_hook(self._take_gradient)  # type: ignore[no-untyped-call]

    def gradient_of(self, param: Tensor) -> Gradient | None:
        """Return this rank's codes of a gradient, and the amax of all of it; None where there is none."""
        return self._held.get(param)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, codes too."""
        super().zero_grad(set_to_none)
        self._held.clear()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, divide: float = 1.0, max_norm: float = 0.0
    ) -> float | None:
        """Take one step, with gradients divided by a number and cut to a norm of at most `max_norm`; 0 = no cut.

        The norm after the division, before the cut, is left in `grad_norm`. Every rank has to call it.
        """
        loss = loss_of(closure)
        work = list(self._work())
        if not work:
            return loss
        group = shard_group(work[0].param)
        agree([one.shard for one in work if one.shard is not None and not one.shard.agreement.fresh], group, self.wire)
        square = (global_norm(one.gradient.q for one in work) / divide).square()
        amaxes = torch.stack([one.gradient.amax for one in work])
        square = torch.where(amaxes.isfinite().all(), square.to(amaxes.device), math.nan)
        norm = over_ranks("sum", square.reshape(1), group, self.wire)[0].sqrt()
        value = norm.item()
        if not math.isfinite(value):
            for settings in self.param_groups:
                settings["skipped"] += 1
            return loss
        self.grad_norm = norm
        self._step_all(work, (max_norm / value if 0 < max_norm < value else 1.0) / divide)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states as they are, codes included.

        Raises: ArtefactError: the states are of another format or shape.
        """
        names = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        for name, param in zip(names, self._params(), strict=True):
            formats = _PAPER if local_shard(param) is not None else _FULL
            state = state_dict["state"].get(name, {})
            for key, format in (("exp_avg", formats.m), ("exp_avg_sq", formats.v)) if state else ():
                codes = state.get(key)
                if not isinstance(codes, DTensor) or codes.dtype != format.dtype or codes.shape != param.shape:
                    raise ArtefactError(
                        f"{key} of parameter {name} must be {format.name} {tuple(param.shape)}, sharded"
                    )
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for name, param in zip(names, self._params(), strict=True):
            if name in state_dict["state"]:
                entries = state_dict["state"][name].items()
                copies = {key: x.detach().clone() if isinstance(x, Tensor) else x for key, x in entries}
                self.state[param] = copies

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @torch.no_grad()
    def _take_gradient(self, param: Tensor) -> None:
        """Turn a shard's gradient into codes with the scale of the whole; FSDP2 calls it once it is there."""
        shard, gradient = local_shard(param), param.grad
        assert shard is not None and isinstance(gradient, DTensor), "FSDP2 has just reduced it"
        values, amax = gradient.to_local().float(), shard.agreement.gradient_amax
        shard.agreement.gradient_amax = None
        before = self._held.get(param)
        if before is not None:
            values, amax = dequantize(before.q) + values, None
        if amax is None:
            own = amax_of(values)
            own = torch.where(own.isfinite(), own, torch.inf)
            amax = over_ranks("max", own.reshape(1), shard_group(param), self.wire)[0]
        if before is not None:
            amax = amax + 0 * before.amax
        self._held[param] = Gradient(quantize(values, E4M3, scale_for(amax, E4M3)), amax)
        param.grad = None

    def _work(self) -> Iterator[_Work]:
        """Find the parameters that have a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                shard, gradient = local_shard(param), param.grad
                if shard is not None and gradient is not None:
                    self._take_gradient(param)
                if shard is not None and param in self._held:
                    yield _Work(param, group, shard, shard, self._held[param])
                if shard is None and gradient is not None:
                    yield _Work(param, group, param.to_local(), None, take(gradient.to_local(), F32))

    def _step_all(self, work: list[_Work], factor: float) -> None:
        """Step all shards, those that kernels can take at once, and agree on what is stored."""
        backend = choose(self.backend, work[0].local.device)
        store = Store(compile=backend == "compile")
        items = []
        for one in work:
            hyper = hyper_of(one.group, int(self.state.get(one.param, {}).get("step", 0)) + 1)
            guard = (_FULL if one.shard is None else _PAPER).guard
            items.append(Item(self._moments(one), one.gradient, hyper, factor, guard, store))
        after = step_items(items, backend)
        coded = [moments for one, moments in zip(work, after, strict=True) if one.shard is not None]
        agreed = iter(self._agree(coded, work[0].param))
        for one, item, moments in zip(work, items, after, strict=True):
            self._keep(one, moments if one.shard is None else next(agreed), item.hyper.step)

    def _agree(self, coded: list[Moments], like: Tensor) -> list[Moments]:
        """Replace the amaxes of shards by those of whole tensors: one MAX, 12 bytes a tensor."""
        if not coded:
            return []
        amaxes = torch.stack([held.amax for moments in coded for held in moments])
        agreed = iter(over_ranks("max", amaxes, shard_group(like), self.wire).unbind())
        return [Moments(*(held._replace(amax=next(agreed)) for held in moments)) for moments in coded]

    def _moments(self, one: _Work) -> Moments:
        """Return a shard and its moments as they are stored, not copies; 0 before the first step."""
        if one.shard is None:
            master, formats = full(one.local), _FULL
        else:
            master, formats = Held(one.shard.quantized, one.shard.agreement.amax.clone()), _PAPER
        state = self.state.get(one.param, {})
        if not state:
            return start(master, formats)
        m, v = (
            Held(Quantized(state[key].to_local(), state[f"{key}_scale"], format), state[f"{key}_amax"])
            for key, format in (("exp_avg", formats.m), ("exp_avg_sq", formats.v))
        )
        return Moments(master, m, v)

    def _keep(self, one: _Work, after: Moments, step: int) -> None:
        """Keep what a step has left; codes that were written in place are there already."""
        if one.shard is not None:
            one.shard.scale.copy_(after.master.q.scale)
            one.shard.agreement.learn(after.master.amax)
        elif after.master.q.codes.data_ptr() != one.local.data_ptr():
            one.local.copy_(after.master.q.codes)
        state = self.state[one.param]
        state["step"] = step
        for key, place in _KEYS:
            held = after[place]
            if key not in state:
                state[key] = like_shard(held.q.codes, one.param)
            state[f"{key}_scale"], state[f"{key}_amax"] = held.q.scale, held.amax
