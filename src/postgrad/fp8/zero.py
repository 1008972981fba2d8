"""Level O3: the optimizer dealt out to the ranks by whole tensors, the weights that all compute with in 8 bits.

A rank steps the tensors it owns and sends their E4M3 codes to the others: a byte a parameter there, as gradients, and a
byte back. What it keeps of a parameter is 1 byte of weight, 1 of gradient, and of those it owns 5 of record and states.

Source:  FP8-LM (arXiv 2310.18313), section 2.3 and algorithm 1.
Differs: codes are made of the weight of record in the optimizer's 16 bits, so that a step gives the numbers of level O2
         on as many ranks, bit for bit. Parameters that are not kept as codes are stepped on every rank alike.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from postgrad.core.distributed import gather_objects
from postgrad.errors import ArtefactError
from postgrad.fp8.adam import F32, hold
from postgrad.fp8.averages import (
    average_plain,
    average_to_owners,
    plain_gradients,
    plain_square,
    square_or_nan,
)
from postgrad.fp8.collectives import Wire, over_ranks, place
from postgrad.fp8.factors import FILLED, WINDOW
from postgrad.fp8.gradients import Gradients
from postgrad.fp8.numerics import E4M3, Format, Quantized, dequantize, quantize
from postgrad.fp8.optimizer import Fp8AdamW, Storing, copies, formats_of, loss_of
from postgrad.fp8.partition import Like, gather_from_owners, greedy_partition
from postgrad.fp8.scaled import scale_parameter_, scaled

MASTER = "master"


class ShardedFp8AdamW(Optimizer):
    """`Fp8AdamW` of the tensors this rank owns, behind the face of an optimizer of all parameters.

    Groups with the state "fp32" stay as they are; the weights of others become E4M3 codes, in place, and their
    gradients too. A step averages the gradients over the ranks itself. `state_dict` and `load_state_dict` speak of the
    whole model, whatever the number of ranks, and every rank has to call them.

    Args: storing: settings of `Fp8AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        group: dist.ProcessGroup | None = None,
        wire: Wire | None = None,
        **storing: Unpack[Storing],
    ) -> None:
        """Deal the weights out and turn them into codes."""
        super().__init__(params, {"lr": lr, "weight_decay": 0.1, "state": "paper"})
        self.group, self.wire, self.gradients = group, wire, Gradients()
        self.grad_norm = torch.zeros((), dtype=torch.float64)
        self.skipped, self.max_norm = 0, storing.get("max_norm", 0.0)
        self._averaged = False
        formats = {param: formats_of(param, own).master for own in self.param_groups for param in own["params"]}
        self._formats: dict[Parameter, Format] = {param: f for param, f in formats.items() if f != F32}
        self.coded = list(self._formats)
        self.plain: list[Parameter] = [param for param in formats if param not in self._formats]
        rank, world = place(group)
        self.partition = greedy_partition([param.numel() for param in self.coded], world)
        self._places: dict[Tensor, int] = {param: i for i, param in enumerate(self.coded)}
        self._owned = set(self.partition.owned[rank])
        self._masters: dict[int, Tensor] = {}
        for i, param in enumerate(self.coded):
            master = self._master(param)
            if i in self._owned:
                self._masters[i] = master
        groups = [
            {**own, "params": [item for param in own["params"] for item in self._own(param)]}
            for own in self.param_groups
        ]
        self.inner = Fp8AdamW(
            groups,
            lr=lr,
            betas=betas,
            eps=eps,
            scales=storing.get("scales", "predictive"),
            rounding=storing.get("rounding", "nearest"),
            backend=storing.get("backend", "auto"),
        )
        self.gradients.attach(self.coded, E4M3)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, codes too."""
        super().zero_grad(set_to_none)
        self.gradients.clear()
        self.inner.zero_grad(set_to_none)
        self._averaged = False

    @torch.no_grad()
    def average(self) -> None:
        """Average the gradients over the ranks, at the owner of each; `step` does it where it was not done."""
        own = average_to_owners(self.gradients, self.coded, self.partition, group=self.group, wire=self.wire)
        for i, gradient in own.items():
            self.inner.gradients.put(self._masters[i], gradient)
        average_plain(self.plain, self.group)
        self._averaged = True

    @torch.no_grad()
    def norm(self) -> Float[Tensor, ""]:
        """Return the norm of the averaged gradients, in float64, the same on all ranks; NaN where one is not finite."""
        squares = torch.full((len(self.coded),), -1.0, dtype=torch.float64, device=self._device())
        for i, master in self._masters.items():
            gradient = self.inner.gradients.of(master)
            if gradient is not None:
                squares[i] = square_or_nan(gradient).nan_to_num(nan=torch.inf)  # a maximum over ranks may lose NaN
        squares = over_ranks("max", squares, self.group)
        plain = [plain_square(gradient) for gradient in plain_gradients(self.plain)]
        every = torch.cat([squares[squares >= 0], torch.stack(plain)] if plain else [squares[squares >= 0]])
        assert len(every), "the loss depends on no parameter that trains: none received a gradient"
        norm = every.sum().sqrt()
        return torch.where(norm.isfinite(), norm, torch.nan)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        divide: float = 1.0,
        max_norm: float | None = None,
        norm: Tensor | None = None,
    ) -> float | None:
        """Take one step as `Fp8AdamW.step` does, each rank of its own tensors, and send their codes to all."""
        loss = loss_of(closure)
        if not self._averaged:
            self.average()
        self.grad_norm = (self.norm() if norm is None else norm) / divide
        length = self.grad_norm.item()
        if not math.isfinite(length):
            self.skipped += 1
            return loss
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"], inner["weight_decay"] = outer["lr"], outer["weight_decay"]
        limit = self.max_norm if max_norm is None else max_norm
        self.inner.step(divide=divide * (length / limit if 0 < limit < length else 1.0))
        self._spread()
        return loss

    def masters(self) -> dict[Tensor, Tensor]:
        """Return the weight of record of each coded parameter that this rank owns."""
        return {self.coded[i]: master for i, master in self._masters.items()}

    def gather_masters(self) -> dict[Tensor, Quantized]:
        """Return the 16-bit weights of record of all coded parameters; every rank has to call it."""
        own = {i: scaled(master).quantized for i, master in self._masters.items()}
        every = gather_from_owners(
            own,
            [self._like(i) for i in range(len(self.coded))],
            self.partition,
            device=self._device(),
            group=self.group,
        )
        return dict(zip(self.coded, every, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the states and the weights of record of all parameters, gathered from the ranks."""
        state = super().state_dict()
        every = self._gathered({i: self._state_of(self.coded[i]) for i in sorted(self._owned)})
        index = 0
        for group in self.param_groups:
            for param in group["params"]:
                known = self._places.get(param)
                entries = dict(self.inner.state[param]) if known is None else every[known]
                state["state"][index] = state["state"].get(index, {}) | entries
                index += 1
        state["state"] = {i: entries for i, entries in state["state"].items() if entries}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what this rank owns of the states of all parameters, written by any number of ranks."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in enumerate(params):
            entries = dict(state_dict["state"].get(index, {}))
            self.state[param] = {key: entries.pop(key) for key in (WINDOW, FILLED) if key in entries}
            place_ = self._places.get(param)
            if place_ is None:
                self.inner.state[param] = copies(entries, param.device)
            elif place_ in self._owned and entries:
                self._take(place_, entries)

    def _gathered(self, own: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Return what the ranks own, together; codes travel as safetensors, which knows FP8."""
        if place(self.group)[1] == 1:
            return own
        tensors = {f"{i}/{key}": x for i, entries in own.items() for key, x in entries.items() if isinstance(x, Tensor)}
        numbers = {i: {k: x for k, x in entries.items() if not isinstance(x, Tensor)} for i, entries in own.items()}
        every: dict[int, dict[str, Any]] = {}
        for packed, plain in gather_objects((save(tensors), numbers)):
            every |= plain
            for name, tensor in load(packed).items():
                i, _, key = name.partition("/")
                every[int(i)][key] = tensor
        return every

    def _take(self, i: int, entries: dict[str, Any]) -> None:
        master = scaled(self._masters[i])
        if MASTER not in entries or entries[MASTER].shape != master.shape:
            raise ArtefactError(
                f"the state of a weight {tuple(master.shape)} has no weight of record of that shape; it was not "
                "written at level O3"
            )
        codes, scale = entries.pop(MASTER).to(master.device), entries.pop(f"{MASTER}_scale").to(master.device)
        master.store(Quantized(codes, scale, master.format))
        self.inner.state[master] = copies(entries, master.device)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """Return a coded parameter's states and weight of record, on the CPU; it is owned here."""
        master = scaled(self._masters[self._places[param]])
        states = self.inner.state[master] | {MASTER: master.codes, f"{MASTER}_scale": master.scale}
        return {
            key: item.detach().cpu().contiguous() if isinstance(item, Tensor) else item for key, item in states.items()
        }

    def _master(self, param: Parameter) -> Parameter:
        """Turn a weight into E4M3 codes, through the format of its weight of record, which is returned."""
        value = dequantize(hold(param.detach(), self._formats[param]).q)
        with torch.no_grad():
            param.copy_(value)
        scale_parameter_(param, E4M3)
        return Parameter(value, requires_grad=False)

    def _own(self, param: Parameter) -> list[Tensor]:
        """Return what the inner optimizer steps in a parameter's place, nothing where another rank does."""
        known = self._places.get(param)
        if known is None:
            return [param]
        return [self._masters[known]] if known in self._owned else []

    def _spread(self) -> None:
        """Give all ranks the codes of the weights of record."""
        codes = {i: quantize(master.detach(), E4M3) for i, master in self._masters.items()}
        likes = [Like(tuple(param.shape), E4M3) for param in self.coded]
        every = gather_from_owners(
            codes, likes, self.partition, device=self._device(), group=self.group, wire=self.wire
        )
        for param, q in zip(self.coded, every, strict=True):
            scaled(param).store(q)

    def _like(self, i: int) -> Like:
        return Like(tuple(self.coded[i].shape), self._formats[self.coded[i]])

    def _device(self) -> torch.device:
        params: Sequence[Tensor] = self.coded or self.plain
        return params[0].device
