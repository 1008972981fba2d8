"""Erasing classes of objects: what is trained, what stays, when it ends, and what is refused."""

from dataclasses import replace

import pytest
import torch

from postgrad.core.layer_adapters import activate, adapter_names, base_hashes, pairs
from postgrad.core.runtime import Job
from postgrad.errors import ConfigError, DataError, GateError
from postgrad.forgetting import erase_boxes as erasing
from postgrad.forgetting.detection import BoxLeakConfig, held_answers, objects_of, predict
from postgrad.forgetting.detector import DetectorConfig, load_detector
from postgrad.forgetting.erase_boxes import PRESETS, BoxMaterial, EraseBoxesConfig, check_erase_boxes, erase_boxes
from postgrad.forgetting.leakfree import soft_knn_leak
from postgrad.forgetting.shapes import SHAPES, shapes

QUICK = replace(
    PRESETS["safe"], rank=2, select_epochs=1, blocks=1, snap=0.0, early=False, floor=100.0, least_steps=0,
    train=replace(PRESETS["safe"].train, epochs=1, batch_size=8, log_every=1),
)  # fmt: skip


LEAKS = {"knn": -1.0, "probe": -1.0, "ridge": -1.0, "temperature": 0.0, "bound_knn": 1.0, "bound_probe": -0.1}
"""Each of them contradicts itself."""


@pytest.fixture(autouse=True)
def matcher():
    """transformers' matcher solves the assignment with scipy."""
    pytest.importorskip("scipy")


def job(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return Job("forget_boxes", folder, 3, torch.device("cpu"), torch.float32, 0, 1, True)


@pytest.fixture
def detector(tmp_path):
    return load_detector(DetectorConfig(width=32, queries=4), SHAPES, job(tmp_path))


def material(number=0, forget=(4,)):
    boxes = shapes(16, "train")
    return BoxMaterial(boxes.showing(forget), boxes.showing(set(range(6)) - set(forget)), number)


def test_the_strongest_block_alone_is_trained_and_the_base_stays(detector, tmp_path):
    before = base_hashes(detector.network)
    outcome = erase_boxes(detector, material(), "one", (), QUICK, job(tmp_path / "run"))
    adapted = pairs(detector.network, "one")
    strongest = max(outcome.norms, key=outcome.norms.__getitem__)
    assert len(outcome.norms) == 4 and len(adapted) == 2 and all(name.startswith(strongest) for name in adapted)
    assert all(bool(b.any()) for _, b in adapted.values())
    assert base_hashes(detector.network) == before
    assert {"forget_ap", "retain_ap", "lost"} <= outcome.figures.keys()


def test_a_later_request_leaves_the_earlier_adapter_alone(detector, tmp_path):
    erase_boxes(detector, material(), "one", (), QUICK, job(tmp_path / "one"))
    before = [matrix.clone() for pair in pairs(detector.network, "one").values() for matrix in pair]
    erase_boxes(detector, material(1, (1,)), "two", ("one",), QUICK, job(tmp_path / "two"))
    after = [matrix for pair in pairs(detector.network, "one").values() for matrix in pair]
    assert all(map(torch.equal, before, after)) and adapter_names(detector.network) == ("one", "two")


def test_paper_trains_every_block_to_the_end(detector, tmp_path):
    paper = PRESETS["paper"]
    assert (paper.train.optim.lr, paper.train.optim.weight_decay, paper.train.optim.clip) == (3e-4, 1e-4, 0.1)
    assert (paper.train.epochs, paper.objective.bound, paper.objective.bound_prototype) == (30, 15.0, 18.0)
    short = replace(paper, train=replace(paper.train, epochs=1, batch_size=8))
    outcome = erase_boxes(detector, material(), "one", (), short, job(tmp_path / "run"))
    assert len(outcome.norms) == 4 and len(pairs(detector.network, "one")) == 8 and outcome.steps == 2


def test_it_ends_early_once_the_classes_are_gone(detector, tmp_path, monkeypatch):
    figures = {"forget_ap": 0.0, "retain_ap": 50.0, "lost": 1.0}
    monkeypatch.setattr(erasing._Task, "figures", lambda task: figures)
    config = replace(QUICK, early=True, train=replace(QUICK.train, epochs=5))
    assert erase_boxes(detector, material(), "one", (), config, job(tmp_path / "run")).steps == 2


def test_epochs_of_few_images_are_repeated_until_there_are_steps_enough(detector, tmp_path):
    config = replace(QUICK, least_steps=5)
    assert erase_boxes(detector, material(), "one", (), config, job(tmp_path / "run")).steps == 6


def test_what_few_blocks_cannot_do_more_are_asked_for(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(erasing._Task, "figures", lambda task: {"forget_ap": 9.0, "retain_ap": 50.0, "lost": 1.0})
    config = replace(QUICK, early=True)
    outcome = erase_boxes(detector, material(), "one", (), config, job(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["blocks-1", "blocks-2", "blocks-4"]
    assert len(pairs(detector.network, "one")) == 8 and outcome.steps == 6


def test_what_costs_too_much_is_refused_and_leaves_nothing(detector, tmp_path, monkeypatch):
    before = detector.find(shapes(2, "test"))[0].scores
    monkeypatch.setattr(erasing._Task, "figures", lambda task: {"forget_ap": 0.0, "retain_ap": 5.0, "lost": 20.0})
    with pytest.raises(GateError, match=r"20\.0 points of AP .* the floor is 10"):
        erase_boxes(detector, material(), "one", (), replace(QUICK, floor=10.0, early=True), job(tmp_path / "run"))
    assert adapter_names(detector.network) == () and torch.equal(detector.find(shapes(2, "test"))[0].scores, before)


def test_an_adapter_of_which_nothing_is_left_is_refused(detector, tmp_path):
    with pytest.raises(GateError, match=r"below erase\.snap"):
        erase_boxes(detector, material(), "one", (), replace(QUICK, snap=1e6), job(tmp_path / "run"))


def test_a_request_needs_images_to_forget_and_to_retain(detector, tmp_path):
    boxes = shapes(8, "train")
    for empty in ("forget", "retain"):
        chosen = replace(material(), **{empty: boxes.showing([])})
        with pytest.raises(DataError, match=f"no image to {empty}"):
            erase_boxes(detector, chosen, "one", (), QUICK, job(tmp_path / empty))


def test_embeddings_are_moved_by_an_erasure_that_hides_and_by_no_preset(detector, tmp_path):
    """Neighbours tell less of the forgotten objects than after the same steps without the term."""
    assert not any(preset.objective.leak.knn or preset.objective.leak.probe for preset in PRESETS.values())
    chosen = material()
    images = [detector.batch(boxes, range(len(boxes))) for boxes in (chosen.forget, chosen.retain)]

    def told(name, knn):
        leak = BoxLeakConfig(knn=knn, bound_knn=0.0, temperature=0.1)
        objective = replace(QUICK.objective, leak=leak, weight_forget=0.0)
        config = replace(QUICK, select_epochs=0, objective=objective, train=replace(QUICK.train, epochs=10))
        erase_boxes(detector, chosen, name, (), config, job(tmp_path / name))
        with torch.no_grad():
            found = [predict(detector.network, batch) for batch in images]
        activate(detector.network, [])
        gone, kept = (objects_of(each, batch.targets) for each, batch in zip(found, images, strict=True))
        return float(soft_knn_leak(*gone, *kept, 0.1))

    assert told("hidden", 20.0) < told("open", 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"blocks": 0}, {"floor": -1.0}, {"train": replace(QUICK.train, epochs=0.5)},
        {"train": replace(QUICK.train, batch_size=0)}, {"objective": replace(QUICK.objective, bound=0.0)},
        {"objective": replace(QUICK.objective, hold=-1.0)}, {"objective": replace(QUICK.objective, fit=-1.0)},
        *({"objective": replace(QUICK.objective, leak=BoxLeakConfig(**{key: value}))} for key, value in LEAKS.items()),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(wrong):
    with pytest.raises(ConfigError, match="erase"):
        check_erase_boxes(replace(EraseBoxesConfig(), **wrong))


def test_what_is_held_are_the_answers_before_without_forgotten_names(detector, tmp_path, monkeypatch):
    """Given to each step image by image, those of earlier requests struck out, too; no weight, nothing is computed."""
    given = []
    step = erasing.detection_forget_step

    def noted(model, retain, forget, structure, config, held=None):
        given.append((held, retain))
        return step(model, retain, forget, structure, config, held)

    monkeypatch.setattr(erasing, "detection_forget_step", noted)
    chosen = replace(material(1), old=(1,))
    before = predict(detector.network, detector.batch(chosen.retain, range(len(chosen.retain))))
    expected = held_answers(before, [1, 4], softmax=False)
    erase_boxes(detector, chosen, "one", (), QUICK, job(tmp_path / "run"))
    for held, retain in given:
        for scores, target in zip(held.scores, retain.targets, strict=True):
            place = next(
                i for i, each in enumerate(chosen.retain.targets) if torch.equal(each["boxes"], target["boxes"])
            )
            torch.testing.assert_close(scores, expected.scores[place])
    given.clear()
    free = replace(QUICK, objective=replace(QUICK.objective, hold=0.0))
    erase_boxes(detector, chosen, "two", (), free, job(tmp_path / "free"))
    assert {held for held, _ in given} == {None}
