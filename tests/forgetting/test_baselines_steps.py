"""Objectives of the baselines: hand values on given outputs, and independence of how a step is split."""

import math
from functools import partial

import pytest
import tiny_vision
import torch
import torch.nn.functional as F

from postgrad.core.vision_models import Seen
from postgrad.forgetting import baselines_steps as steps
from postgrad.forgetting.baselines_batches import Batch, Deal, alternating, together
from postgrad.forgetting.baselines_steps import Original, Task, View
from postgrad.forgetting.distillation import attention_map, kl_distance

FORGET, RETAIN = tiny_vision.sides(tiny_vision.images(3, 0))
KEPT = (0, 2, 3)


def outputs(num, seed):
    generator = torch.Generator().manual_seed(seed)
    return Seen(torch.randn(num, 6, generator=generator), 2 * torch.randn(num, 4, generator=generator))


STUDENT, TEACHER = (outputs(9, 1), outputs(3, 2)), (outputs(9, 3), outputs(3, 4))


def case(numbers, **original):
    """A task, and a view of three retained and two images to forget, with outputs that are given."""
    task = Task(
        student=tiny_vision.fresh(),
        retain=RETAIN,
        forget=FORGET,
        numbers=numbers,
        allowed=KEPT,
        columns=KEPT,
        original=Original(retain=TEACHER[0], forget=TEACHER[1], **original),
    )
    batch = Batch(torch.tensor([4, 0, 7]), torch.tensor([2, 0]), 3, 2)
    view = View(
        batch,
        *(
            Seen(seen.features[at], seen.logits[at])
            for seen, at in zip(STUDENT, (batch.retain, batch.forget), strict=True)
        ),
        RETAIN.labels[batch.retain],
        FORGET.labels[batch.forget],
        5,
    )
    return task, view


def ce(view, side):
    seen, labels = {"retain": (view.retain, view.labels), "forget": (view.forget, view.forgotten)}[side]
    return F.cross_entropy(seen.logits, labels)


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_random_labels_are_kept_classes_and_change_with_the_step():
    task, view = case({})
    assert set(steps.random_labels(task, view).tolist()) <= set(KEPT)
    other = View(view.batch, view.retain, view.forget, view.labels, view.forgotten, 6)
    table = [steps.random_labels(task, one).tolist() for one in (view, view, other)]
    assert table[0] == table[1]


def test_neggrad_is_bounded():
    task, view = case({"forget": 0.2, "bound": 3.0})
    each = F.cross_entropy(view.forget.logits, view.forgotten, reduction="none")
    near(steps.neggrad_objective(task, view), ce(view, "retain") + 0.2 * F.relu(3.0 - each).mean())
    low = Task(**{**vars(task), "numbers": {"forget": 0.2, "bound": 1e-6}})
    near(steps.neggrad_objective(low, view), ce(view, "retain"))
    near(steps.retain_objective(task, view), ce(view, "retain"))


def test_relabelling_averages_over_both_sets():
    task, view = case({})
    logits = torch.cat([view.retain.logits, view.forget.logits])
    labels = torch.cat([view.labels, steps.random_labels(task, view)])
    near(steps.relabel_objective(task, view), F.cross_entropy(logits, labels))


def test_a_penalty_is_nothing_at_the_start():
    task, view = case({"lambda": 5.0})
    own = {name: param.detach().clone() for name, param in task.student.named_parameters()}
    ones = {name: torch.ones_like(value) for name, value in own.items()}
    held = Task(**{**vars(task), "original": Original(weights=own, importance=ones)})
    near(steps.penalised_objective(held, view), steps.relabel_objective(task, view))
    with torch.no_grad():
        task.student.head().bias += 0.5  # four entries: 4 / 4 = 1
    near(steps.penalised_objective(held, view), steps.relabel_objective(task, view) + 5.0)


def test_lwf():
    task, view = case({"kd": 0.5, "remain": 10.0, "temperature": 2.0})
    base = F.cross_entropy(view.forget.logits, steps.random_labels(task, view)) + 10 * ce(view, "retain")
    target = (TEACHER[0].logits[view.batch.retain] / 2).softmax(1)
    distil = -(target * (view.retain.logits / 2).log_softmax(1)).sum(1).mean()
    near(steps.lwf_objective(task, view), base + 0.5 * distil)
    near(steps.lwf_official_objective(task, view), base)


def test_der_and_fdr():
    task, view = case({"lambda": 0.1, "replay": 0.5})
    lost = F.cross_entropy(view.forget.logits, steps.random_labels(task, view))
    features = (view.retain.features - TEACHER[0].features[view.batch.retain]).square().sum()
    logits = view.retain.logits - TEACHER[0].logits[view.batch.retain]
    replay = 0.5 * ce(view, "retain")
    near(steps.der_objective(task, view), lost + 0.1 * features + replay)
    near(steps.der_logits_objective(task, view), lost + 0.1 * logits.square().sum(1).mean() + replay)
    near(steps.fdr_objective(task, view), lost + 0.1 * logits.norm(dim=1).mean())
    chances = view.retain.logits.softmax(1) - TEACHER[0].logits[view.batch.retain].softmax(1)
    near(steps.fdr_probabilities_objective(task, view), lost + 0.1 * chances.norm(dim=1).mean())


def test_scrub_obeys_on_what_is_kept_and_disobeys_on_the_rest():
    numbers = {"gamma": 2.0, "alpha": 0.3, "temperature": 2.0, "smoothing": 0.0}
    task, both = case(numbers)
    none, at = torch.empty(0, dtype=torch.int64), both.batch
    lost = View(Batch(none, at.forget, 0, 2), both.retain, both.forget, both.labels, both.forgotten, 0)
    target = TEACHER[1].logits[at.forget]
    near(steps.scrub_objective(task, lost), -kl_distance(both.forget.logits, target, temperature=2.0).mean())
    kept = View(Batch(at.retain, none, 3, 0), both.retain, both.forget, both.labels, both.forgotten, 0)
    held = kl_distance(both.retain.logits, TEACHER[0].logits[at.retain], temperature=2.0).mean()
    want = 2 * ce(both, "retain") + 0.3 * held
    near(steps.scrub_objective(task, kept), want)
    bias = "network.head.bias"
    average = {bias: task.student.head().bias.detach() + 0.5}  # four entries off by 1/2: distance 1
    smooth = Task(
        **{**vars(task), "numbers": {**numbers, "smoothing": 0.7}, "original": Original(*TEACHER, None, average)}
    )
    near(steps.scrub_objective(smooth, kept), want + 0.7)


def test_lirf_distils_the_kept_classes_and_moves_the_middle():
    numbers = {"a": 0.1, "temperature": 10.0, "attention": 300.0, "distil": 10.0, "replay": 5.0}
    hidden = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    task, view = case(numbers, attention=attention_map(hidden))
    view = View(**{**vars(view), "middle": hidden[view.batch.forget] ** 3})
    kept = list(KEPT)
    near_logits = view.forget.logits[:, kept], TEACHER[1].logits[view.batch.forget][:, kept]
    maps = attention_map(view.middle) - attention_map(hidden[view.batch.forget])
    want = (
        0.9 * F.cross_entropy(view.forget.logits, steps.random_labels(task, view))
        - 300 * maps.square().mean()
        + 10 * 0.1 * kl_distance(*near_logits, temperature=10.0).mean()
        + 5 * ce(view, "retain")
    )
    near(steps.lirf_objective(task, view), want)


NUMBERS = {
    "retain": {},
    "neggrad": {"forget": 0.2, "bound": 3.0},
    "relabel": {},
    "penalised": {"lambda": 5.0},
    "lwf": {"kd": 0.5, "remain": 2.0, "temperature": 2.0},
    "der": {"lambda": 0.1, "replay": 0.5},
    "der_logits": {"lambda": 0.1, "replay": 0.5},
    "fdr": {"lambda": 0.3},
    "scrub": {"gamma": 2.0, "alpha": 0.3, "temperature": 2.0, "smoothing": 0.1},
    "lirf": {"a": 0.1, "temperature": 10.0, "attention": 300.0, "distil": 10.0, "replay": 5.0},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_steps_gradient_does_not_depend_on_its_split(name):
    student = tiny_vision.fresh(3)
    generator = torch.Generator().manual_seed(0)
    shifted = {
        own: param.detach() + 0.1 * torch.rand(param.shape, generator=generator)
        for own, param in student.named_parameters()
    }
    wide = [Seen(torch.randn(len(part), 16, generator=generator), torch.randn(len(part), 4, generator=generator))
            for part in (RETAIN, FORGET)]  # fmt: skip
    original = Original(*wide, attention_map(torch.randn(3, 8, 16, generator=generator)), shifted, shifted)
    task = Task(
        student=student, retain=RETAIN, forget=FORGET, numbers=NUMBERS[name], allowed=KEPT, columns=KEPT,
        middle="blocks.1" if name == "lirf" else "", original=original,
    )  # fmt: skip
    loss_fn = partial(steps.baseline_step, task, vars(steps)[f"{name}_objective"])
    for step in range(2):
        found = []
        for world, micro in ((1, 0), (2, 0), (1, 3)):
            student.zero_grad()
            make = (
                partial(alternating, 9, 3, 4, 1, seed=0) if name == "scrub" else partial(together, 9, 3, 4, 1, seed=0)
            )
            losses = [
                loss_fn(batch, step) for rank in range(world) for batch in make(deal=Deal(rank, world, micro))[step]
            ]
            weight = sum(loss.weight for loss in losses)
            total = sum(loss.sum for loss in losses) / weight
            total.backward()
            found.append(
                [total.detach(), *(param.grad.clone() for param in student.parameters() if param.grad is not None)]
            )
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)
    assert math.isfinite(float(found[0][0]))
