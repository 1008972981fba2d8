"""Erasing a request: it forgets and keeps, in few blocks, and whatever stops it, it ends in the same bytes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forget_runs import Killed
from tiny_digits import GONE, LATER, PLAIN, images, job, material, quick, taught
from torch import Tensor

from postgrad.core.layer_adapters import REINITIAL_GAIN, activate, active_names, adapter_names, pairs
from postgrad.core.report import read_metrics
from postgrad.core.runtime import progress
from postgrad.core.vision_models import Classifier, Seen, classifier_hash
from postgrad.errors import ConfigError, GateError
from postgrad.forgetting import erase as module
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.erase import erase
from postgrad.forgetting.erase_config import PRESETS, EraseConfig, careful, check_erase
from postgrad.forgetting.leak_terms import LeakTerms
from postgrad.forgetting.losses import ObjectiveConfig, group_norms, lora_groups
from postgrad.forgetting.schedules import PRESETS as PUBLISHED
from postgrad.forgetting.views import View, share_right

FIRST, SECOND = "request-1", "request-2"
KEPT = (0, 1, 2, 3, 4, 5, 6, 7)
NOTHING = replace(quick(epochs=2), objective=ObjectiveConfig(beta=0.0, alpha=0.003))
"""Asks for nothing to be forgotten, so no number of blocks suffices."""
HARSH = replace(quick(epochs=1), patience=0)
HARSH = replace(HARSH, train=replace(HARSH.train, optim=replace(HARSH.train.optim, lr=1.0)))
"""Loses what it was to keep."""
STEPS = -(-len(material().retain) // 32)
"""Of an epoch."""


def logits(classifier: Classifier) -> Tensor:
    return View(classifier, images()[1]).see_all().logits


def right(classifier: Classifier, classes: tuple[int, ...]) -> float:
    part = images()[0].of_classes(classes)
    return share_right(View(classifier, part).see_all(), part.labels)


def matrices(classifier: Classifier, name: str = FIRST) -> dict[str, Tensor]:
    found = pairs(classifier.network, name)
    return {f"{layer} {which}": m.detach().clone() for layer, pair in found.items() for which, m in enumerate(pair)}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def blocks_of(classifier: Classifier, linears: tuple[str, ...]) -> list[int]:
    blocks = ffn_blocks(classifier.network)
    return [number for number, block in enumerate(blocks) if set(block.linears) & set(linears)]


@pytest.mark.parametrize("preset", ("safe", "gs-lora", "gs-lora++"))
def test_it_forgets_and_keeps_in_few_blocks(preset: str, tmp_path: Path) -> None:
    classifier = taught()
    before, hashes = right(classifier, KEPT), classifier_hash(classifier)
    found = erase(classifier, material(), FIRST, (), quick(PRESETS[preset]), job(tmp_path))
    assert right(classifier, GONE) == found.figures["forget_accuracy"] == 0.0
    kept = right(classifier, KEPT)
    assert kept == found.figures["retain_accuracy"] == pytest.approx(before - found.figures["lost"])
    assert found.figures["lost"] <= 1.0 and found.figures["enough"] == float(preset != "safe")
    assert ("leak_found" in found.figures) == (preset == "safe")
    assert found.linears == tuple(pairs(classifier.network, FIRST)) and len(blocks_of(classifier, found.linears)) < 3
    assert set(found.norms) == {block.name for block in ffn_blocks(classifier.network)}
    assert classifier_hash(classifier) == hashes and not classifier.training


@pytest.fixture
def contented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first attempt stand, whatever came of it."""
    monkeypatch.setattr(module, "_done", lambda *_: True)


@pytest.mark.usefixtures("contented")
@pytest.mark.parametrize(("strength", "kept"), (((3.0, 2.0, 1.0), 1), ((3.0, 1.0, 2.0), 2)))
def test_only_later_blocks_stay_and_the_strongest_of_them(
    strength: tuple[float, ...], kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = taught()
    names = [block.name for block in ffn_blocks(classifier.network)]
    monkeypatch.setattr(module, "_norms", lambda task: dict(zip(names, strength, strict=True)))
    found = erase(classifier, material(), FIRST, (), replace(quick(epochs=1), patience=0), job(tmp_path))
    assert blocks_of(classifier, found.linears) == [kept] and found.norms == dict(zip(names, strength, strict=True))


def test_a_second_request_leaves_the_first_alone(tmp_path: Path) -> None:
    classifier = taught()
    erase(classifier, material(), FIRST, (), quick(), job(tmp_path / "1"))
    first = matrices(classifier)
    erase(classifier, material(LATER, GONE), SECOND, (FIRST,), quick(), job(tmp_path / "2"))
    assert adapter_names(classifier.network) == (FIRST, SECOND) and same(matrices(classifier), first)
    assert right(classifier, LATER) == 0.0 and right(classifier, GONE) <= 10.0
    assert right(classifier, (0, 1, 2, 4, 5, 6, 7)) > 80


def test_the_base_is_asked_for_answers_whatever_was_forgotten_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, asked = taught(), material(LATER, GONE)
    original = classifier(asked.forget.images).logits, classifier(asked.retain.images).logits
    erase(classifier, material(), FIRST, (), quick(), job(tmp_path / "1"))
    heard: list[tuple[Seen, Seen]] = []
    note: Callable[..., LeakTerms] = module.leak_terms

    def noted(*args: Any) -> LeakTerms:
        heard.append(args[3])
        return note(*args)

    monkeypatch.setattr(module, "leak_terms", noted)
    erase(classifier, asked, SECOND, (FIRST,), quick(PRESETS["safe"], 1), job(tmp_path / "2"))
    (base,) = heard
    for seen, expected in zip(base, original, strict=True):
        torch.testing.assert_close(seen.logits, expected)
    assert active_names(classifier.network) == (FIRST, SECOND)


def test_where_few_blocks_do_not_suffice_more_are_tried(tmp_path: Path) -> None:
    classifier = taught()
    found = erase(classifier, material(), FIRST, (), NOTHING, job(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks-1", "blocks-2", "blocks-3"]
    assert blocks_of(classifier, found.linears) == [0, 1, 2] and found.figures["forget_accuracy"] > 0.0
    assert found.steps == 3 * 2 * STEPS and adapter_names(classifier.network) == (FIRST,)
    assert not (tmp_path / "blocks-3" / "select").exists()


def test_epochs_of_few_images_are_repeated_until_there_are_steps_enough(tmp_path: Path) -> None:
    config = replace(quick(epochs=2), patience=0, select_epochs=0)
    for least, epochs in ((0, 2), (2 * STEPS + 1, 3), (5 * STEPS, 5)):
        part = job(tmp_path / f"{least}")
        found = erase(taught(), material(), FIRST, (), replace(config, least_steps=least), part)
        assert found.steps == epochs * STEPS


def test_without_a_choice_of_blocks_nothing_is_trained_to_choose(tmp_path: Path) -> None:
    """Two of three blocks are late, so keeping two leaves no choice."""
    classifier = taught()
    found = erase(classifier, material(), FIRST, (), replace(quick(), blocks=2), job(tmp_path))
    assert blocks_of(classifier, found.linears) == [1, 2]
    assert not (tmp_path / "blocks-2" / "select").exists() and len(found.norms) == 2


@pytest.mark.usefixtures("contented")
def test_image_passes_count_the_blocks_that_are_computed(tmp_path: Path) -> None:
    """One epoch on all blocks, then two from the block that stays: each has STEPS of 2 x 32 images."""
    config = replace(quick(epochs=2), patience=0)
    classifier = taught()
    found = erase(classifier, material(), FIRST, (), config, job(tmp_path))
    (kept,) = blocks_of(classifier, found.linears)
    assert found.image_passes == pytest.approx(64 * STEPS * (1 + 2 * (3 - kept) / 3))


def test_training_goes_on_until_it_was_enough_so_often(tmp_path: Path) -> None:
    once, thrice = (
        erase(taught(), material(), FIRST, (), replace(quick(), patience=patience), job(tmp_path / f"{patience}")).steps
        for patience in (1, 3)
    )
    assert once + 2 * STEPS <= thrice < 20 * STEPS


def stopped(config: EraseConfig, folder: Path, advances: int, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Kill an erasure when its progress has moved so often, then run it to its end."""
    left = [advances]
    advance = progress.advance

    def count(self: progress, n: int = 1, note: str = "") -> None:
        advance(self, n, note)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    patch.setattr(progress, "advance", count)
    with pytest.raises(Killed):
        erase(taught(), material(), FIRST, (), config, job(folder))
    patch.undo()
    classifier = taught()
    erase(classifier, material(), FIRST, (), config, job(folder))
    return matrices(classifier)


def test_a_stopped_erasure_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the sparse phase, at its end, and where two of three evaluations were met."""
    config = replace(quick(), patience=3)
    config = replace(config, train=replace(config.train, save_every=4))
    classifier = taught()
    steps = erase(classifier, material(), FIRST, (), config, job(tmp_path / "straight")).steps
    for advances in (3, STEPS, STEPS + steps - 1):
        folder = tmp_path / f"{advances}"
        assert same(stopped(config, folder, advances, monkeypatch), matrices(classifier)), advances


def test_a_finished_erasure_is_loaded(tmp_path: Path) -> None:
    one, two = taught(), taught()
    first = erase(one, material(), FIRST, (), quick(), job(tmp_path))
    rows = read_metrics(tmp_path / "blocks-1" / "train")
    again = erase(two, material(), FIRST, (), quick(), job(tmp_path))
    assert again == first and same(matrices(one), matrices(two))
    assert read_metrics(tmp_path / "blocks-1" / "train") == rows


def test_at_the_floor_the_classifier_answers_as_before(tmp_path: Path) -> None:
    classifier = taught()
    erase(classifier, material(LATER), FIRST, (), quick(), job(tmp_path / "1"))
    before = logits(classifier)
    with pytest.raises(GateError, match=r"^\d+\.\d points .* floor is 0\.5"):
        erase(classifier, material(), SECOND, (FIRST,), replace(HARSH, floor=0.5), job(tmp_path / "2"))
    assert adapter_names(classifier.network) == (FIRST,) and torch.equal(logits(classifier), before)
    erase(classifier, material(), SECOND, (FIRST,), replace(HARSH, floor=100.0), job(tmp_path / "2"))
    assert adapter_names(classifier.network) == (FIRST, SECOND) and not torch.equal(logits(classifier), before)


def calls_a_step(config: EraseConfig, folder: Path) -> float:
    """Count the network's calls with gradients, over the steps."""
    classifier, calls = taught(), [0]

    def count(*_: object) -> None:
        calls[0] += torch.is_grad_enabled()

    classifier.network.register_forward_hook(count)
    found = erase(classifier, material(), FIRST, (), config, job(folder))
    return calls[0] / (found.steps + STEPS * config.select_epochs)


def test_the_papers_presets_use_every_block_and_two_passes(tmp_path: Path) -> None:
    for name in ("paper", "paper++"):
        classifier = taught()
        found = erase(classifier, material(), FIRST, (), quick(PRESETS[name], 2), job(tmp_path / name))
        assert blocks_of(classifier, found.linears) == [0, 1, 2] and found.steps == 2 * STEPS
        rates = {row["lr"] for row in read_metrics(tmp_path / name / "blocks-3" / "train") if "lr" in row}
        assert rates == {1e-5 + (1e-2 - 1e-5) / 2}  # of the second of two epochs
    assert calls_a_step(quick(PRESETS["paper"], 2), tmp_path / "two") == 2
    assert calls_a_step(replace(quick(epochs=2), patience=0), tmp_path / "one") == 1


def test_the_papers_presets_have_the_published_numbers() -> None:
    published = PUBLISHED["continual-face"]
    for name, gain in (("paper", 0.0), ("paper++", 0.01)):
        found = PRESETS[name]
        assert found.objective == replace(published.objective(), weight_forget=gain)
        assert (found.rank, found.scale, found.train.batch_size, found.train.epochs) == (8, 1.0, 48, 100)
        optim = found.train.optim
        assert (optim.lr, optim.lr * optim.final, optim.weight_decay) == (1e-2, pytest.approx(1e-5), 0.05)
        assert not found.leak.proxy and not found.snap


@pytest.mark.usefixtures("contented")
def test_the_gain_of_later_tasks_is_the_papers_only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gains: list[float] = []
    initialise: Callable[..., None] = module.initialise

    def noted(*args: Any, gain: float, **named: Any) -> None:
        gains.append(gain)
        initialise(*args, gain=gain, **named)

    monkeypatch.setattr(module, "initialise", noted)
    for name in ("paper", "gs-lora"):
        config = quick(PRESETS[name], 1)
        for number, asked in enumerate((material(), material(LATER, GONE))):
            config = replace(config, patience=0, floor=100.0)
            erase(taught(), asked, FIRST, (), config, job(tmp_path / f"{name}{number}"))
    assert gains == [1.0, REINITIAL_GAIN, 1.0, 1.0]


@pytest.mark.parametrize("grouping", ("block", "lora"))
def test_groups_that_end_small_are_zero_and_taken_off(grouping: str, tmp_path: Path) -> None:
    """Between the smallest and the largest norm, some groups go and some stay; what that costs is told."""
    config = replace(quick(PLAIN, 6), select_epochs=0, snap=0.0, patience=0, floor=100.0, grouping=grouping)
    whole = taught()
    erase(whole, material(), FIRST, (), config, job(tmp_path / "whole"))
    own = pairs(whole.network, FIRST)
    blocks = [[own[layer] for layer in block.linears] for block in ffn_blocks(whole.network)]
    norms = group_norms(lora_groups(blocks, config.grouping))
    limit = float(norms.sort().values[len(norms) // 2])
    cut = taught()
    found = erase(cut, material(), FIRST, (), replace(config, snap=limit), job(tmp_path / "cut"))
    members = [b.linears if grouping == "block" else (layer,) for b in ffn_blocks(whole.network) for layer in b.linears]
    groups = list(dict.fromkeys(members))
    kept = [layer for group, norm in zip(groups, norms.tolist(), strict=True) if norm >= limit for layer in group]
    assert found.linears == tuple(kept) and 0 < len(kept) < 6
    assert all(torch.equal(value, matrices(whole)[name]) for name, value in matrices(cut).items())
    told = (found.figures["forget_accuracy"], found.figures["retain_accuracy"])
    assert told == (right(cut, GONE), right(cut, KEPT)) != (right(whole, GONE), right(whole, KEPT))


def test_an_adapter_without_a_group_left_is_refused(tmp_path: Path) -> None:
    classifier = taught()
    before = logits(classifier)
    config = replace(quick(epochs=1), snap=1e6, patience=0)
    with pytest.raises(GateError, match=r"below erase\.snap \(1000000\.0\): sparsity"):
        erase(classifier, material(), FIRST, (), config, job(tmp_path))
    assert adapter_names(classifier.network) == () and torch.equal(logits(classifier), before)


def test_sparsity_counts_from_an_epoch_on(tmp_path: Path) -> None:
    config = replace(quick(epochs=2), select_epochs=0, patience=0, alpha_from=1)
    config = replace(config, train=replace(config.train, log_every=1))
    erase(taught(), material(), FIRST, (), config, job(tmp_path))
    rows = [row for row in read_metrics(tmp_path / "blocks-3" / "train") if "structure" in row]
    assert [row["structure"] != 0 for row in rows] == [False] * STEPS + [True] * STEPS


@pytest.mark.usefixtures("contented")
def test_attention_can_be_adapted_instead(tmp_path: Path) -> None:
    classifier = taught()
    config = replace(quick(epochs=1), placement="attention", patience=0)
    found = erase(classifier, material(), FIRST, (), config, job(tmp_path))
    assert len(found.linears) == 3 and all("attention" in layer for layer in found.linears)
    activate(classifier.network, [])
    assert same(dict(classifier.eval().named_parameters()), dict(classifier.named_parameters()))


@pytest.mark.usefixtures("contented")
@pytest.mark.parametrize(("kept", "spared"), ((KEPT, False), (KEPT[:4], True)))
def test_kept_classes_without_images_are_spared(kept: tuple[int, ...], spared: bool, tmp_path: Path) -> None:
    """Nothing but the terms differs, so the rows of the log tell: without a push the forgetting term is 0."""
    asked, config = material(), quick(PRESETS["safe"], 1)
    erase(taught(), replace(asked, retain=asked.retain.of_classes(kept)), FIRST, (), config, job(tmp_path))
    (row, *_) = [row for row in read_metrics(tmp_path / "blocks-1" / "train") if "forget" in row]
    assert (row["forget"] == 0.0) == spared


def test_thorough_changes_every_block(tmp_path: Path) -> None:
    classifier = taught()
    found = erase(classifier, material(), FIRST, (), quick(PRESETS["thorough"], 6), job(tmp_path))
    assert blocks_of(classifier, found.linears) == [0, 1, 2] and not (tmp_path / "blocks-3" / "select").exists()
    assert right(classifier, GONE) == 0.0


def test_sparing_needs_a_proxy_term() -> None:
    config = PRESETS["safe"]
    assert careful(PLAIN) is PLAIN
    assert (careful(config).objective.beta, careful(config).leak.proxy) == (0.0, config.leak.unseen)
    assert PRESETS["thorough"].leak.compress and not careful(PRESETS["thorough"]).leak.compress


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"rank": 0}, "rank must be at least 1"),
        ({"scale": 0.0}, "scale above 0"),
        ({"blocks": 0}, r"erase\.blocks: expected at least 1 block"),
        ({"select_epochs": -1}, r"erase\.select_epochs: expected 0 or more, found -1"),
        ({"snap": -0.1}, r"erase\.snap"),
        ({"patience": -1}, r"erase\.patience"),
        ({"least_steps": -1}, r"erase\.least_steps"),
        ({"floor": -1.0}, r"erase\.floor"),
        ({"alpha_from": -1}, r"erase\.alpha_from"),
        ({"objective": ObjectiveConfig(bound=0.0)}, r"erase\.objective: bound must be above 0"),
        ({"objective": ObjectiveConfig(beta=-1.0)}, r"erase\.objective"),
        ({"objective": ObjectiveConfig(alpha=-1.0)}, r"erase\.objective"),
        ({"leak": replace(PLAIN.leak, knn=-1.0)}, r"erase\.leak\.knn: expected a weight of 0 or more"),
        ({"train": replace(PLAIN.train, batch_size=0)}, r"erase\.train: .* batch_size at least 1"),
        ({"train": replace(PLAIN.train, optim=replace(PLAIN.train.optim, lr=0.0))}, r"erase\.train: .*lr"),
        ({"train": replace(PLAIN.train, epochs=0.5)}, r"erase\.train: .* whole number .* found 0\.5"),
        ({"train": replace(PLAIN.train, max_steps=7)}, r"erase\.train: .* no max_steps"),
    ),
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_erase(replace(EraseConfig(), **change))


def test_every_preset_makes_sense() -> None:
    for preset in PRESETS.values():
        check_erase(preset)
