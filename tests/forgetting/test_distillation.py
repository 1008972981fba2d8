"""Distances of student and teacher: hand values, the reference numbers, properties, gradients."""

import json
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from postgrad.forgetting.distillation import (
    attention_distance,
    attention_map,
    der_distance,
    fdr_distance,
    full,
    kl_distance,
    lwf_distance,
    lwf_official_distance,
    root,
)


def fill(shape, k, scale):
    """The reference files' closed-form tensor."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * i + 0.013 * i * i + 1.3 * k + 0.1)).reshape(shape).float()


def near(got, want, rtol=1e-6):
    torch.testing.assert_close(got.detach(), torch.as_tensor(want, dtype=got.dtype), rtol=rtol, atol=1e-9)


STUDENT, TEACHER = fill((4, 5), 0, 2.0), fill((4, 5), 1, 2.0)


def test_equal_the_official_functions():
    near(der_distance(STUDENT, TEACHER).sum(), 58.2776833)
    near(fdr_distance(STUDENT, TEACHER).mean(), 3.8036008)
    near(kl_distance(STUDENT, TEACHER, temperature=2.0).mean(), 1.2359535)
    assert not lwf_official_distance(STUDENT, TEACHER, temperature=2.0).any()
    maps = [attention_map(fill((2, 6, 4), k, 1.0)) for k in (7, 8)]
    near(attention_distance(*maps).mean(), 0.0856882, rtol=2e-6)


def test_lwf_equals_a_peers_distillation(shared):
    case = json.loads((shared / "oracles/continual_kd_losses.json").read_text())
    arrays = np.load(shared / "oracles/continual_kd_losses.npz")
    new, old = torch.from_numpy(arrays["logits"])[:, :10], torch.from_numpy(arrays["old_logits"])
    for temperature in (1, 2):
        want = case["values"][f"kd_T{temperature}"]
        near(lwf_distance(new, old, temperature=float(temperature)).mean(), want, rtol=1e-6)


def test_hand_values():
    """Teacher odds 4:1 and T = 2: softened odds 2:1. A student without preference has 1/2 each, at any temperature.

    Cross entropy ln 2; KL = ln 2 - (ln 3 - 2/3 ln 2); times T^2 = 4.
    """
    teacher, student = torch.tensor([[math.log(4), 0.0]]), torch.tensor([[1.0, 1.0]])
    near(lwf_distance(student, teacher, temperature=2.0), [math.log(2)])
    near(kl_distance(student, teacher, temperature=2.0), [4 * (5 / 3 * math.log(2) - math.log(3))], rtol=1e-5)
    a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, 6.0], [0.0, 0.0]])
    near(der_distance(a, b), [25.0, 0.0])
    near(fdr_distance(a, b), [5.0, 0.0])
    hidden = torch.tensor([[[3.0, 1e-3], [1.0, 1e-3]]])  # mean squares 5 and 1e-6; the second coordinate is faint
    near(attention_map(hidden), [[1.0, 0.0]])
    near(attention_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])), [1.0])


def test_a_convolutions_map_is_over_pixels():
    hidden = fill((3, 4, 2, 5), 2, 1.0)
    want = torch.nn.functional.normalize(hidden.square().mean(1).flatten(1))
    near(attention_map(hidden, faint=0.0), want)
    assert attention_map(hidden).shape == (3, 10)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_distillation_is_least_at_the_teacher(temperature):
    near(kl_distance(TEACHER, TEACHER, temperature=temperature), torch.zeros(4))
    for distance in (kl_distance, lwf_distance):
        student = TEACHER.clone().requires_grad_()
        distance(student, TEACHER, temperature=temperature).sum().backward()
        assert student.grad.abs().max() < 1e-6
    assert (lwf_distance(STUDENT, TEACHER, temperature=temperature) > 0).all()


def test_lwf_and_kl_have_the_same_gradient_up_to_the_temperature():
    gradients = []
    for distance in (lwf_distance, kl_distance):
        student = STUDENT.clone().requires_grad_()
        distance(student, TEACHER, temperature=2.0).sum().backward()
        gradients.append(student.grad)
    near(gradients[1], 4 * gradients[0], rtol=1e-4)


def test_the_official_lwf_teaches_nothing():
    student = STUDENT.clone().requires_grad_()
    lwf_official_distance(student, TEACHER, temperature=2.0).sum().backward()
    assert not student.grad.any()


def test_gradients():
    a, b = (x.double().requires_grad_() for x in (STUDENT, TEACHER))
    for distance in (
        lambda x, y: kl_distance(x, y, temperature=3.0),
        lambda x, y: lwf_distance(x, y, temperature=3.0),
        der_distance,
        fdr_distance,
        lambda x, y: attention_distance(attention_map(x[:, :, None]), attention_map(y[:, :, None])),
        lambda x, y: attention_distance(attention_map(x[None]), attention_map(y[None])),
    ):
        assert gradcheck(distance, (a, b))


def test_the_gradient_where_student_and_teacher_are_equal_is_zero():
    student = TEACHER.clone().requires_grad_()
    fdr_distance(student, TEACHER).sum().backward()
    assert not student.grad.any()
    assert root(torch.tensor([0.0, 4.0])).tolist() == [0.0, 2.0]


def test_half_precision_is_computed_in_float32():
    assert kl_distance(STUDENT.bfloat16(), TEACHER.bfloat16(), temperature=2.0).dtype == torch.float32
    assert full(STUDENT.double()).dtype == torch.float64
