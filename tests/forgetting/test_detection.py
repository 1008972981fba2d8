"""A detector's objective: against the reference, against brute force, and what it does to a tiny detector."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from networks import inputs, network

from postgrad.core.layer_adapters import activate, inject, pairs
from postgrad.errors import DataError, ModelError
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.detection import (
    BoxLeakConfig,
    DetectorBatch,
    DetectorLosses,
    DetectorObjectiveConfig,
    Held,
    Objects,
    Predictions,
    class_prototypes,
    detection_forget_step,
    detector_losses,
    forget_objective,
    held_answers,
    hold_loss,
    leak_losses,
    match,
    matched_embeddings,
    objects_of,
    of_classes,
    predict,
    remain_objective,
)

DETECTORS = ["detr", "deformable_detr"]
ZERO = torch.zeros(())


@pytest.fixture(autouse=True)
def matcher():
    """transformers' matcher solves the assignment with scipy."""
    pytest.importorskip("scipy")


def target(*boxes):
    """Make a target of (class, centre x, centre y, width, height)."""
    rows = torch.tensor([box[1:] for box in boxes]).reshape(-1, 4)
    return {"class_labels": torch.tensor([box[0] for box in boxes], dtype=torch.int64), "boxes": rows}


ONE = target((1, 0.5, 0.5, 0.4, 0.4), (3, 0.2, 0.3, 0.2, 0.5))
TWO = target((0, 0.7, 0.6, 0.3, 0.2))


def forgetting(name):
    model = network(name)
    blocks = ffn_blocks(model)
    inject(model, "request", [layer for block in blocks for layer in block.linears], rank=2, alpha=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, b in pairs(model, "request").values():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
    activate(model, ["request"], trainable="request")
    return model


def step(model, **settings):
    batch = inputs("detr")
    retain, forget = DetectorBatch(batch[:2], [ONE, TWO]), DetectorBatch(batch[2:], [TWO, ONE])
    return detection_forget_step(model, retain, forget, ZERO, DetectorObjectiveConfig(**settings))


def corners(box):
    return torch.cat([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])


def giou(one, other):
    """Overlap over union, less the share of the hull that is in neither."""
    one, other = corners(one), corners(other)
    low, high = torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])
    common = (high - low).clamp(min=0).prod()
    union = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - common
    hull = (torch.maximum(one[2:], other[2:]) - torch.minimum(one[:2], other[:2])).prod()
    return common / union - (hull - union) / hull


def class_cost(logits, label, softmax):
    if softmax:
        return -logits.softmax(-1)[label]
    p = logits.sigmoid()[label]
    return 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()


def brute_force(found, targets, config, softmax):
    """Give C, L1 and GIoU of the cheapest assignment, found by trying all."""
    chosen = []
    for logits, boxes, truth in zip(found.logits, found.boxes, targets, strict=True):

        def cost(queries, logits=logits, boxes=boxes, truth=truth):
            pairs_ = zip(queries, truth["class_labels"].tolist(), truth["boxes"].double(), strict=True)
            return sum(
                config.class_cost * class_cost(logits[q], label, softmax)
                + config.bbox_cost * (boxes[q] - box).abs().sum()
                - config.giou_cost * giou(boxes[q], box)
                for q, label, box in pairs_
            )

        num = len(truth["class_labels"])
        chosen.append(min(itertools.permutations(range(len(boxes)), num), key=cost) if num else ())
    num_boxes = max(1, sum(len(truth["boxes"]) for truth in targets))
    wanted = torch.full(found.logits.shape[:2], config.num_labels)
    l1, overlap = 0.0, 0.0
    for i, queries in enumerate(chosen):
        for q, label, box in zip(queries, targets[i]["class_labels"], targets[i]["boxes"].double(), strict=True):
            wanted[i, q] = label
            l1 += (found.boxes[i, q] - box).abs().sum()
            overlap += 1 - giou(found.boxes[i, q], box)
    if softmax:
        weight = torch.ones(config.num_labels + 1, dtype=torch.float64)
        weight[-1] = config.eos_coefficient
        classes = F.cross_entropy(found.logits.flatten(0, 1), wanted.flatten(), weight)
    else:
        p, onehot = found.logits.sigmoid(), F.one_hot(wanted, config.num_labels + 1)[..., :-1].double()
        sure = torch.where(onehot > 0, p, 1 - p)
        share = torch.where(onehot > 0, config.focal_alpha, 1 - config.focal_alpha)
        classes = (share * (1 - sure) ** 2 * -sure.log()).sum() / num_boxes
    return classes, l1 / num_boxes, overlap / num_boxes, chosen


def test_the_forgetting_objective_is_the_references(shared):
    oracle = json.loads((shared / "oracles" / "forget_losses.json").read_text())["detector"]
    losses = DetectorLosses(torch.tensor(oracle["loss_ce"]), torch.tensor(0.3), torch.tensor(0.4))
    assert float(forget_objective(losses)) == pytest.approx(oracle["example_total_with_bbox_0.3_giou_0.4"], rel=1e-6)
    assert float(remain_objective(losses)) == pytest.approx(2 * oracle["loss_ce"] + 1.5 + 0.8, rel=1e-6)
    assert float(forget_objective(losses._replace(classes=torch.tensor(7.6)))) == pytest.approx(1.5 + 0.8)


def test_transformers_focal_loss_is_the_references(shared):
    oracle = json.loads((shared / "oracles" / "forget_losses.json").read_text())["detector"]
    model = network("deformable_detr")
    found = Predictions(torch.tensor(oracle["logits"]), torch.full((1, 3, 4), 0.3), torch.zeros(1, 3, 32))
    matched = [(torch.tensor([0, 2]), torch.tensor([0, 1]))]
    boxes = target((1, 0.3, 0.3, 0.3, 0.3), (3, 0.3, 0.3, 0.3, 0.3))
    losses = detector_losses(model, found, [boxes], matched)
    assert float(losses.classes) == pytest.approx(oracle["loss_ce"], rel=1e-5)
    assert float(forget_objective(losses)) == pytest.approx(oracle["forget_cls_term"], rel=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_are_those_of_the_best_assignment(name):
    model = network(name)
    found = predict(model, DetectorBatch(inputs(name, 3), [ONE, TWO, target()]))
    targets = [ONE, TWO, target()]
    matched = match(model, found, targets)
    losses = detector_losses(model, found, targets, matched)
    exact = Predictions(*(part.detach().double() for part in found))
    *expected, chosen = brute_force(exact, targets, model.config, name == "detr")
    order = [
        [int(q) for _, q in sorted(zip(boxes.tolist(), queries.tolist(), strict=True))] for queries, boxes in matched
    ]
    assert order == [list(queries) for queries in chosen]
    torch.testing.assert_close(torch.stack(list(losses)).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DETECTORS)
def test_embeddings_are_what_the_prototypes_multiply(name):
    model = network(name)
    found = predict(model, DetectorBatch(inputs(name, 2), [ONE, TWO]))
    rows = class_prototypes(model)
    assert rows.shape == (4, 32) and not rows.requires_grad
    head = model.class_labels_classifier if name == "detr" else model.class_embed[-1]
    torch.testing.assert_close(found.embeddings @ rows.T + head.bias[:4], found.logits[..., :4])
    matched = [(torch.tensor([4, 1]), torch.tensor([1, 0])), (torch.tensor([2]), torch.tensor([0]))]
    embeddings, labels = matched_embeddings(found, [ONE, TWO], matched)
    assert labels.tolist() == [3, 1, 0]
    assert torch.equal(
        embeddings, torch.stack([found.embeddings[0, 4], found.embeddings[0, 1], found.embeddings[1, 2]])
    )


@pytest.mark.parametrize("name", DETECTORS)
def test_a_step_adds_its_terms_up_and_trains_adapters_only(name):
    model = forgetting(name)
    settings = {"beta": 0.5, "weight_forget": 0.3, "weight_retain": 0.2, "alpha": 0.1}
    config = DetectorObjectiveConfig(**settings)
    batch = inputs(name)
    retain, forget = DetectorBatch(batch[:2], [ONE, TWO]), DetectorBatch(batch[2:], [TWO, ONE])
    terms = detection_forget_step(model, retain, forget, torch.tensor(2.0), config)
    expected = []
    for part in (retain, forget):
        found = predict(model, part)
        matched = match(model, found, part.targets)
        losses = detector_losses(model, found, part.targets, matched)
        embeddings, labels = matched_embeddings(found, part.targets, matched)
        target_ = class_prototypes(model)[labels].softmax(-1)
        divergence = (target_ * (target_.log() - embeddings.log_softmax(-1))).sum(-1).mean()
        expected.append((losses, divergence))
    (kept, near), (lost, far) = expected
    want = {
        "retain": 2 * kept.classes + 5 * kept.box_l1 + 2 * kept.box_giou,
        "forget": 0.5 * ((15 - 2 * lost.classes).clamp(min=0) + 5 * lost.box_l1 + 2 * lost.box_giou),
        "structure": torch.tensor(0.2),
        "prototype_forget": 0.3 * (18 - far).clamp(min=0),
        "prototype_retain": 0.2 * near,
    }
    for key, value in want.items():
        torch.testing.assert_close(getattr(terms, key), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.total, sum(want.values()), rtol=1e-5, atol=1e-5)
    terms.total.backward()
    moved = {key for key, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {key for key, _ in model.named_parameters() if ".lora_" in key}


def test_gs_lora_alone_needs_no_prototypes():
    terms = step(forgetting("detr"), weight_forget=0.0, alpha=0.0)
    assert terms.prototype_forget == terms.prototype_retain == terms.structure == 0
    torch.testing.assert_close(terms.total, terms.retain + terms.forget)


def test_a_bound_that_is_reached_leaves_only_the_boxes():
    model = forgetting("deformable_detr")
    beyond = step(model, beta=1.0, bound=0.0, bound_prototype=0.0)
    assert beyond.prototype_forget == 0
    model.zero_grad()
    step(model, beta=1.0, bound=15.0).total.backward()
    assert step(model, beta=1.0, bound=15.0).forget > beyond.forget


@pytest.mark.parametrize("name", DETECTORS)
def test_training_raises_the_class_loss_of_what_is_forgotten(name):
    model = forgetting(name)
    batch = inputs(name)
    retain, forget = DetectorBatch(batch[:2], [ONE, target()]), DetectorBatch(batch[2:], [TWO, TWO])

    def class_loss():
        with torch.no_grad():
            found = predict(model, forget)
            return float(detector_losses(model, found, forget.targets, match(model, found, forget.targets)).classes)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    before = class_loss()
    for _ in range(8):
        optimizer.zero_grad()
        detection_forget_step(model, retain, forget, ZERO, DetectorObjectiveConfig(beta=1.0)).total.backward()
        optimizer.step()
    assert class_loss() > 1.2 * before


def test_targets_are_split_by_class():
    kept = of_classes([ONE, TWO], [3, 0])
    assert [t["class_labels"].tolist() for t in kept] == [[3], [0]]
    assert torch.equal(kept[0]["boxes"], ONE["boxes"][1:])
    assert of_classes([TWO], [])[0]["boxes"].shape == (0, 4)


def test_a_batch_with_nothing_to_forget_is_refused():
    batch = inputs("detr")
    retain, forget = DetectorBatch(batch[:2], [ONE, TWO]), DetectorBatch(batch[2:], [target(), target()])
    with pytest.raises(DataError, match="background"):
        detection_forget_step(network("detr"), retain, forget, ZERO, DetectorObjectiveConfig())
    terms = detection_forget_step(network("detr"), forget, retain, ZERO, DetectorObjectiveConfig(weight_retain=1.0))
    assert terms.prototype_retain == 0 and torch.isfinite(terms.total)


def test_other_detectors_are_refused():
    with pytest.raises(ModelError, match="DetrForObjectDetection"):
        predict(network("vit"), DetectorBatch(inputs("vit"), []))


LOGITS = torch.tensor([[[2.0, 0.0, -1.0], [-3.0, 1.0, 0.5]]])
BOXES = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.6, 0.5, 0.4, 0.2]]])
BEFORE = Predictions(LOGITS, BOXES, torch.zeros(1, 2, 4))


def test_struck_names_are_denied_and_the_others_are_as_they_were():
    held = held_answers(BEFORE, [1], softmax=False)
    torch.testing.assert_close(held.scores[..., [0, 2]], LOGITS.sigmoid()[..., [0, 2]])
    assert held.scores[..., 1].eq(0).all() and torch.equal(held.boxes, BOXES)
    mutual = held_answers(BEFORE, [1], softmax=True).scores
    torch.testing.assert_close(mutual.sum(-1), torch.ones(1, 2))
    torch.testing.assert_close(mutual[..., 2], LOGITS.softmax(-1)[..., 1:].sum(-1))
    assert mutual[..., 1].eq(0).all() and torch.equal(mutual[..., 0], LOGITS.softmax(-1)[..., 0])


@pytest.mark.parametrize("softmax", [True, False])
def test_answers_are_held_to_what_they_were(softmax):
    """Zero where nothing changed, and by hand where something did."""
    held = held_answers(BEFORE, [], softmax=softmax)
    torch.testing.assert_close(hold_loss(BEFORE, held, softmax=softmax), torch.tensor(0.0), atol=1e-6, rtol=0)
    now = Predictions(LOGITS + torch.tensor([0.3, -0.2, 0.1]), BOXES + 0.05, BEFORE.embeddings)
    total = sure = 0.0
    for q in range(2):
        p, new = held.scores[0, q], now.logits[0, q]
        if softmax:
            kl = (p * (p.log() - new.softmax(-1).log())).sum()
            weight = 1 - p[-1]
        else:
            s = new.sigmoid()
            kl = (p * (p / s).log() + (1 - p) * ((1 - p) / (1 - s)).log()).sum()
            weight = p.max()
        total, sure = total + kl + 5 * weight * 4 * 0.05, sure + weight
    torch.testing.assert_close(hold_loss(now, held, softmax=softmax), total / max(sure, torch.tensor(1.0)))


@pytest.mark.parametrize("softmax", [True, False])
def test_what_is_struck_out_is_finite_and_pushes_down(softmax):
    logits = LOGITS.clone().requires_grad_()
    held = held_answers(BEFORE, [1], softmax=softmax)
    hold_loss(Predictions(logits, BOXES, BEFORE.embeddings), held, softmax=softmax).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and (logits.grad[..., 1] > 0).all()


@pytest.mark.parametrize("name", DETECTORS)
def test_the_held_answers_count_by_their_weight(name):
    model = forgetting(name)
    batch = inputs("detr")
    retain, forget = DetectorBatch(batch[:2], [ONE, TWO]), DetectorBatch(batch[2:], [TWO, ONE])
    softmax = name == "detr"
    activate(model, [])
    with torch.no_grad():
        held = held_answers(predict(model, retain), [0], softmax=softmax)
    activate(model, ["request"], trainable="request")
    found = [
        detection_forget_step(model, retain, forget, ZERO, DetectorObjectiveConfig(hold=weight), held)
        for weight in (0.0, 1.0, 3.0)
    ]
    assert found[0].hold == 0 < found[1].hold and isinstance(held, Held)
    torch.testing.assert_close(found[2].hold, 3 * found[1].hold)
    torch.testing.assert_close(found[2].total, found[0].total + found[2].hold)


def objects(labels, *embeddings):
    return Objects(torch.tensor(embeddings), torch.tensor(labels))


def test_the_neighbours_that_tell_are_counted_above_their_bound():
    gone, kept = objects([1, 1], [2.0, 0.0], [0.0, 1.0]), objects([0], [3.0, 0.0])
    config = BoxLeakConfig(knn=2.0, temperature=1.0, bound_knn=0.1)
    share = (1 / (1 + torch.e) + 0.5) / 2  # cosines of the first: 0 and 1; of the second: 0 and 0
    knn, probe = leak_losses(gone, kept, config)
    assert float(knn) == pytest.approx(2 * math.log(0.9 / (1 - share)), rel=1e-5) and probe == 0
    assert leak_losses(gone, kept, BoxLeakConfig(knn=2.0, temperature=1.0, bound_knn=0.4))[0] == 0


def test_what_a_regression_finds_is_counted_above_its_bound():
    gone, kept = objects([1, 1], [1.0], [0.0]), objects([0, 0], [0.0], [0.0])
    config = BoxLeakConfig(probe=3.0, ridge=0.5, bound_probe=0.2)
    weight = 0.5 / (1.5 * 0.75)  # x y = 0.5 and x x = 0.75, centred; y y = 1
    explained = 2 * weight * 0.5 - weight**2 * 0.75
    knn, probe = leak_losses(gone, kept, config)
    assert float(probe) == pytest.approx(3 * math.log(0.8 / (1 - explained)), rel=1e-5) and knn == 0
    assert leak_losses(gone, kept, BoxLeakConfig(probe=3.0, ridge=0.5, bound_probe=0.3))[1] == 0


def test_hiding_moves_forgotten_objects_alone():
    gone, kept = (
        Objects(torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_(), torch.tensor(labels))
        for seed, labels in ((0, [1] * 6), (1, [0, 0, 2, 2, 3, 3]))
    )
    config = BoxLeakConfig(knn=1.0, probe=1.0, bound_knn=0.0, bound_probe=0.0)
    sum(leak_losses(gone, kept, config)).backward()
    assert kept.embeddings.grad is None and bool(gone.embeddings.grad.any(1).all())


def test_objects_are_read_from_the_nearest_queries_whatever_they_are_named():
    boxes = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.3
    boxes[0, 3], boxes[0, 1], boxes[1, 4] = ONE["boxes"][0], ONE["boxes"][1], TWO["boxes"][0]
    embeddings = torch.arange(20.0).reshape(2, 5, 2)
    found = objects_of(Predictions(torch.zeros(2, 5, 4), boxes, embeddings), [ONE, TWO])
    assert found.labels.tolist() == [1, 3, 0]
    assert torch.equal(found.embeddings, torch.stack([embeddings[0, 3], embeddings[0, 1], embeddings[1, 4]]))


@pytest.mark.parametrize("name", DETECTORS)
def test_terms_that_hide_are_off_by_default_and_add_up(name):
    model = forgetting(name)
    usual = step(model)
    assert usual.leak_knn == usual.leak_probe == 0
    hidden = step(model, leak=BoxLeakConfig(knn=2.0, bound_knn=0.0, probe=0.5, bound_probe=0.0))
    assert hidden.leak_knn > 0 < hidden.leak_probe
    torch.testing.assert_close(hidden.total, usual.total + hidden.leak_knn + hidden.leak_probe)
    twice = step(model, leak=BoxLeakConfig(knn=4.0, bound_knn=0.0))
    torch.testing.assert_close(twice.leak_knn, 2 * hidden.leak_knn)


def test_boxes_to_forget_need_not_be_fitted():
    losses = DetectorLosses(torch.tensor(1.5), torch.tensor(0.3), torch.tensor(0.4))
    assert float(forget_objective(losses, 4.0, 0.0)) == pytest.approx(1.0)
    assert float(forget_objective(losses, 4.0, 0.5)) == pytest.approx(1.0 + 0.75 + 0.4)
    model = forgetting("detr")
    assert step(model, fit=0.0, bound=1e-3).forget < 1e-3 < step(model, bound=1e-3).forget
