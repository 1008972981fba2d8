"""Relearning: what was only hidden comes back at once, and the model attacked stays as it was."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.relearn import (
    Labelled,
    RelearnConfig,
    Relearned,
    choose_shots,
    relearn,
    relearn_ratio,
)


class Answer(NamedTuple):
    features: Tensor
    logits: Tensor


class Small(nn.Module):
    """A layer and a head, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.drop, self.head = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, inputs: Tensor) -> Answer:
        features = self.drop(torch.tanh(self.body(inputs.float())))
        return Answer(features, self.head(features))


def samples(num: int, seed: int) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(num) % 4
    return Labelled(centres[labels] + torch.randn(num, 8, generator=generator), labels)


def only(data: Labelled, classes: tuple[int, ...]) -> Labelled:
    keep = torch.isin(data.labels, torch.tensor(classes))
    return Labelled(data.inputs[keep], data.labels[keep])


def trained(classes: tuple[int, ...]) -> Small:
    model, data = Small(0).eval(), only(samples(400, 1), classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs).logits, data.labels).backward()
        optimizer.step()
    return model


FORGOTTEN = (2, 3)
CONFIG = RelearnConfig(shots=4, steps=60, batch=8, lr=1e-2)


def test_what_was_hidden_comes_back_faster_than_it_is_learnt() -> None:
    hidden, gold = trained((0, 1, 2, 3)), trained((0, 1))
    with torch.no_grad():  # the features stay
        hidden.head.weight[2:] = 0
        hidden.head.bias[2:] = -3.0
    shots, test = only(samples(16, 2), FORGOTTEN), only(samples(200, 3), FORGOTTEN)
    ours, golds = (relearn(model, shots, test, CONFIG, seed=0) for model in (hidden, gold))
    assert ours.accuracy[0] < 20 and golds.accuracy[0] == 0
    assert ours.accuracy[-1] > 90 and golds.accuracy[-1] > 90
    assert relearn_ratio(ours, golds, 0.9, 100.0) < 1


def test_the_attacked_model_stays_and_the_attack_repeats() -> None:
    model = trained((0, 1)).train().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shots, test = only(samples(16, 2), FORGOTTEN), only(samples(40, 3), FORGOTTEN)
    first = relearn(model, shots, test, CONFIG, seed=0)
    torch.manual_seed(5)
    assert relearn(model, shots, test, CONFIG, seed=0) == first
    other = relearn(model, shots, test, RelearnConfig(shots=4, steps=40, batch=3, lr=1e-3), seed=1)
    assert other.images[:3] == (0, 3, 6) and other != first
    assert model.training and not any(value.requires_grad for value in model.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_tests_come_in_step_and_at_the_end() -> None:
    config = RelearnConfig(shots=4, steps=7, batch=8, test_every=3)
    shots, test = only(samples(24, 2), FORGOTTEN), only(samples(40, 3), FORGOTTEN)
    # 12 shots in batches of 8, 4, 8, 4, ...
    assert relearn(Small(0), shots, test, config, seed=0).images == (0, 20, 36, 44)


def test_the_last_part_relearns_from_cached_activations() -> None:
    model = trained((0, 1))
    shots, test = only(samples(16, 2), FORGOTTEN), only(samples(40, 3), FORGOTTEN)
    cached = [Labelled(model(data.inputs).features.detach(), data.labels) for data in (shots, test)]
    found = relearn(model.head, *cached, CONFIG, seed=0, read=lambda part, inputs: part(inputs))
    assert found.accuracy[-1] > 80


def test_samples_until_a_share_is_back() -> None:
    found = Relearned((0, 8, 16, 24), (0.0, 30.0, 45.0, 81.0))
    assert found.images_to(0.5, 90.0) == 16
    assert found.images_to(0.9, 90.0) == 24
    assert found.images_to(0.9, 100.0) is None
    assert Relearned((0, 8), (50.0, 90.0)).images_to(0.5, 90.0) == 0


def test_ratios_to_gold_by_hand() -> None:
    fast, slow = Relearned((0, 8, 16), (0.0, 60.0, 90.0)), Relearned((0, 8, 16), (0.0, 10.0, 60.0))
    assert relearn_ratio(fast, slow, 0.5, 100.0) == 0.5
    assert relearn_ratio(slow, fast, 0.5, 100.0) == 2.0
    assert relearn_ratio(slow, fast, 0.9, 100.0) == math.inf
    # Gold never got there: at least its whole budget.
    assert relearn_ratio(fast, slow, 0.9, 100.0) == 1.0
    assert math.isnan(relearn_ratio(slow, slow, 0.9, 100.0))
    assert math.isnan(relearn_ratio(fast, Relearned((0,), (99.0,)), 0.5, 100.0))


def test_shots_are_drawn_class_by_class() -> None:
    labels = torch.arange(40) % 4
    index = choose_shots(labels, (3, 1), 5, seed=0)
    assert labels[index].tolist() == [3] * 5 + [1] * 5
    assert len(set(index.tolist())) == 10
    assert index.equal(choose_shots(labels, (3, 1), 5, seed=0))
    assert not index.equal(choose_shots(labels, (3, 1), 5, seed=1))
    # What is drawn of a class does not hang on the other classes.
    assert index[5:].equal(choose_shots(labels, (1,), 5, seed=0))
    with pytest.raises(DataError, match="11 samples of class 1, found 10"):
        choose_shots(labels, (1,), 11, seed=0)


@pytest.mark.parametrize(
    "config", [RelearnConfig(shots=0), RelearnConfig(steps=0), RelearnConfig(test_every=0), RelearnConfig(lr=0.0)]
)
def test_an_attack_must_do_something(config: RelearnConfig) -> None:
    with pytest.raises(ConfigError, match="expected"):
        relearn(Small(0), samples(8, 2), samples(8, 3), config, seed=0)
