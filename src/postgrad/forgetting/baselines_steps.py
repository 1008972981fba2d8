"""One step of each baseline: its objective, as a sum over the images of a micro-batch.

Letters: R retained and F forgotten images of a micro-batch, N images, D features, K classes, M coordinates of an
attention map. Below, x_r are retained images with labels y, x_f those to forget, y' random labels, f the logits, h the
features, f0 and h0 the original model's; means are over the images of a step.

Source:  the methods' papers, named at each objective, and GS-LoRA's released code (arXiv 2403.11530), "GS-LoRA" below.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from postgrad.core.loop import Loss
from postgrad.core.numbers import full
from postgrad.core.runtime import stage_seed
from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier, Seen
from postgrad.forgetting.baselines_batches import Batch, relabelled
from postgrad.forgetting.distillation import (
    attention_distance,
    attention_map,
    der_distance,
    fdr_distance,
    kl_distance,
    lwf_distance,
    lwf_official_distance,
)
from postgrad.forgetting.regularisers import drift, penalty


@dataclass(frozen=True)
class Original:
    """What the original model makes of the images, and its weights; empty where a method does not ask."""

    retain: Seen | None = None
    forget: Seen | None = None
    attention: Float[Tensor, "N M"] | None = None
    """Attention maps of the images to forget."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    importance: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the steps of a run share."""

    student: Classifier
    retain: ImageSet
    forget: ImageSet
    numbers: Mapping[str, float]
    """The method's own numbers, by name."""
    allowed: tuple[int, ...]
    """Classes that random labels are drawn from."""
    columns: tuple[int, ...] = ()
    """Classes whose logits are distilled, where not all are."""
    middle: str = ""
    """Block whose output is looked at, where one is."""
    original: Original = Original()
    seed: int = 0


@dataclass(frozen=True)
class View:
    """What the student makes of a micro-batch, and how much of its step that is."""

    batch: Batch
    retain: Seen
    forget: Seen
    labels: Int[Tensor, " R"]
    forgotten: Int[Tensor, " F"]
    step: int
    middle: Tensor | None = None
    """The middle block's output for the images to forget."""

    def over_retain(self, values: Float[Tensor, " R"]) -> Float[Tensor, ""]:
        """Give this part of the mean over the step's retained images; 0 where it has none."""
        return values.sum() / max(1, self.batch.num_retain)

    def over_forget(self, values: Float[Tensor, " F"]) -> Float[Tensor, ""]:
        """Give this part of the mean over the step's images to forget; 0 where it has none."""
        return values.sum() / max(1, self.batch.num_forget)


Objective = Callable[[Task, View], Float[Tensor, ""]]
Distance = Callable[[Tensor, Tensor], Float[Tensor, " R"]]


def baseline_step(task: Task, objective: Objective, batch: Batch, step: int) -> Loss:
    """Compute a micro-batch's part of a step's objective; its weight is its images."""
    view = look(task, batch, step)
    value = objective(task, view)
    metrics = {
        "retain_ce": (cross_entropy(view.retain, view.labels).detach().sum(), float(len(batch.retain))),
        "forget_ce": (cross_entropy(view.forget, view.forgotten).detach().sum(), float(len(batch.forget))),
    }
    return Loss(value * (batch.num_retain + batch.num_forget), float(len(batch)), metrics)


def look(task: Task, batch: Batch, step: int) -> View:
    """Run the student on a micro-batch, in one pass, and look up what else its objective may ask for."""
    device = next(task.student.parameters()).device
    images = torch.cat([task.retain.images[batch.retain], task.forget.images[batch.forget]])
    with captured(task.student, task.middle) as kept:
        seen: Seen = task.student(images.to(device))
    num = len(batch.retain)
    return View(
        batch,
        Seen(seen.features[:num], seen.logits[:num]),
        Seen(seen.features[num:], seen.logits[num:]),
        task.retain.labels[batch.retain].to(device),
        task.forget.labels[batch.forget].to(device),
        step,
        kept[0][num:] if kept else None,
    )


@contextmanager
def captured(classifier: Classifier, block: str) -> Iterator[list[Tensor]]:
    """Collect a block's outputs within the block; "" collects nothing."""
    kept: list[Tensor] = []
    if not block:
        yield kept
        return

    def keep(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = classifier.network.get_submodule(block).register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def cross_entropy(seen: Seen, labels: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return each image's cross entropy, in nats."""
    return F.cross_entropy(full(seen.logits), labels, reduction="none")


def random_labels(task: Task, view: View) -> Int[Tensor, " F"]:
    """Draw labels for the images to forget, anew in each step and alike on all ranks."""
    seed = stage_seed(task.seed, "labels", view.step)
    drawn = relabelled(task.forget.labels.cpu(), task.allowed, seed)
    return drawn[view.batch.forget].to(view.forgotten.device)


def retain_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return the mean CE(x_r, y): training on retained images only."""
    return view.over_retain(cross_entropy(view.retain, view.labels))


def neggrad_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return mean CE(x_r, y) + forget * mean relu(bound - CE(x_f, y)).

    Source:  NegGrad+ (Kurmanji et al., arXiv 2302.09880): b CE(x_r) - (1 - b) CE(x_f).
    Differs: bounded, image by image, so that ascent ends; forget is (1 - b) / b.
    """
    lack = F.relu(task.numbers["bound"] - cross_entropy(view.forget, view.forgotten))
    return retain_objective(task, view) + task.numbers["forget"] * view.over_forget(lack)


def relabel_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return the mean cross entropy over both sets together, those to forget with random labels.

    Source:  amnesiac unlearning (Graves et al., arXiv 2010.10981), and SalUn (arXiv 2310.12508) with its mask.
    Differs: labels are drawn anew at each step; amnesiac unlearning draws them once, GS-LoRA and SalUn as here.
    """
    kept, lost = cross_entropy(view.retain, view.labels), cross_entropy(view.forget, random_labels(task, view))
    return (kept.sum() + lost.sum()) / (view.batch.num_retain + view.batch.num_forget)


def penalised_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return `relabel_objective` + lambda * `penalty`: L2, EWC and MAS, which in GS-LoRA replay retained images."""
    held = penalty(dict(task.student.named_parameters()), task.original.weights, task.original.importance)
    return relabel_objective(task, view) + task.numbers["lambda"] * view.batch.share * held


def lwf_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return mean CE(x_f, y') + kd * mean `lwf_distance`(f, f0; x_r) + remain * mean CE(x_r, y)."""
    return _lwf(task, view, lwf_distance(*_logits(task, view), temperature=task.numbers["temperature"]))


def lwf_official_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return `lwf_objective` with GS-LoRA's `lwf_official_distance`, which is 0."""
    return _lwf(task, view, lwf_official_distance(*_logits(task, view), temperature=task.numbers["temperature"]))


def _lwf(task: Task, view: View, distance: Float[Tensor, " R"]) -> Float[Tensor, ""]:
    lost = view.over_forget(cross_entropy(view.forget, random_labels(task, view)))
    held = task.numbers["kd"] * view.over_retain(distance)
    return lost + held + task.numbers["remain"] * retain_objective(task, view)


def der_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return mean CE(x_f, y') + lambda * sum ||h - h0||^2 of x_r + replay * mean CE(x_r, y).

    Source:  GS-LoRA's DER, and its DER++ with replay > 0: features, summed over the batch and so larger with it.
    Differs: DER++ replays the same retained images; GS-LoRA takes the next batch, DER's paper draws another.
    """
    original = task.original.retain
    assert original is not None, "DER compares with the original model"
    target = _rows(original.features, view.batch.retain, view.retain.features)
    return _der(task, view, der_distance(view.retain.features, target).sum())


def der_logits_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return mean CE(x_f, y') + lambda * mean ||f - f0||^2 of x_r + replay * mean CE(x_r, y).

    Source:  DER and DER++ (Buzzega et al., arXiv 2004.07211).
    """
    return _der(task, view, view.over_retain(der_distance(*_logits(task, view))))


def _der(task: Task, view: View, held: Float[Tensor, ""]) -> Float[Tensor, ""]:
    lost = view.over_forget(cross_entropy(view.forget, random_labels(task, view)))
    return lost + task.numbers["lambda"] * held + task.numbers["replay"] * retain_objective(task, view)


def fdr_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return mean CE(x_f, y') + lambda * mean ||f - f0|| of x_r, as in GS-LoRA."""
    lost = view.over_forget(cross_entropy(view.forget, random_labels(task, view)))
    return lost + task.numbers["lambda"] * view.over_retain(fdr_distance(*_logits(task, view)))


def fdr_probabilities_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return `fdr_objective` with probabilities in place of logits, as the code of DER's authors has FDR."""
    student, original = (full(logits).softmax(1) for logits in _logits(task, view))
    lost = view.over_forget(cross_entropy(view.forget, random_labels(task, view)))
    return lost + task.numbers["lambda"] * view.over_retain(fdr_distance(student, original))


def scrub_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return -mean KL(x_f) in a step that forgets, gamma * mean CE(x_r, y) + alpha * mean KL(x_r) in another.

    With KL = `kl_distance` to the original model; both + smoothing * `drift` from a running average of the weights.
    Source:  SCRUB (Kurmanji et al., arXiv 2302.09880); GS-LoRA's SCRUB-S has smoothing > 0.
    """
    temperature = task.numbers["temperature"]
    if view.batch.num_forget:
        assert task.original.forget is not None, "SCRUB compares with the original model"
        target = _rows(task.original.forget.logits, view.batch.forget, view.forget.logits)
        value = -view.over_forget(kl_distance(view.forget.logits, target, temperature=temperature))
    else:
        near = view.over_retain(kl_distance(*_logits(task, view), temperature=temperature))
        value = task.numbers["gamma"] * retain_objective(task, view) + task.numbers["alpha"] * near
    if not task.numbers["smoothing"]:
        return value
    moved = drift(dict(task.student.named_parameters()), task.original.weights)
    return value + task.numbers["smoothing"] * view.batch.share * moved


def lirf_objective(task: Task, view: View) -> Float[Tensor, ""]:
    """Return (1 - a) mean CE(x_f, y') - attention * AT(x_f) + distil * a T^2 KL(x_f) + replay * mean CE(x_r, y).

    AT is the mean `attention_distance` at the end of the lower half, which alone trains; the KL is over the logits of
    the kept classes only.
    Source:  GS-LoRA's LIRF, after Ye et al. (arXiv 2207.08224), whose own weights were not available.
    Differs: GS-LoRA also computes losses of a module that would hold what was forgotten, for recovery. No optimizer
             updates that module and nothing of it reaches the student, so it is left out.
    """
    original, numbers = task.original, task.numbers
    assert original.forget is not None, "LIRF compares with the original model"
    assert original.attention is not None and view.middle is not None, "LIRF compares attention maps"
    maps = _rows(original.attention, view.batch.forget, view.retain.logits)
    moved = view.over_forget(attention_distance(attention_map(view.middle), maps))
    columns = torch.tensor(task.columns, device=view.forget.logits.device)
    target = _rows(original.forget.logits, view.batch.forget, view.forget.logits)[:, columns]
    near = kl_distance(view.forget.logits[:, columns], target, temperature=numbers["temperature"])
    lost = view.over_forget(cross_entropy(view.forget, random_labels(task, view)))
    value = (1 - numbers["a"]) * lost - numbers["attention"] * moved
    value = value + numbers["distil"] * numbers["a"] * view.over_forget(near)
    return value + numbers["replay"] * retain_objective(task, view)


def _logits(task: Task, view: View) -> tuple[Tensor, Tensor]:
    """Give the student's and the original model's logits of the retained images."""
    original = task.original.retain
    assert original is not None, "this objective compares with the original model"
    return view.retain.logits, _rows(original.logits, view.batch.retain, view.retain.logits)


def _rows(table: Tensor, places: Tensor, beside: Tensor) -> Tensor:
    """Look up rows, on the device of another tensor."""
    return table[places].to(beside.device)
