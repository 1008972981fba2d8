"""Forgetting losses and group norms: hand values, the reference numbers, properties."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from postgrad.forgetting.losses import (
    Batch,
    ObjectiveConfig,
    bounded_forget,
    bounded_prototype,
    detector_forget,
    focal,
    focal_forget,
    forget_loss,
    group_norms,
    lora_groups,
    prototype_kl,
    prototype_l2,
    prototypes,
    prox,
    reporting_norm,
    retain_ce,
    snap,
    structure,
)


def fill(shape, k, scale):
    """The reference files' closed-form tensor."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * i + 0.013 * i * i + 1.3 * k + 0.1)).reshape(shape).float()


@pytest.fixture(scope="module")
def case(shared):
    return json.loads((shared / "oracles/forget_losses.json").read_text())


@pytest.fixture(scope="module")
def sparse(shared):
    return json.loads((shared / "oracles/forget_structure_loss.json").read_text())


def near(got, want, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(got.detach(), torch.as_tensor(want, dtype=got.dtype), rtol=rtol, atol=atol)


def batches(inputs):
    """Both batches of a reference case and its prototypes, all with gradients."""
    sides = [
        Batch(
            torch.tensor(inputs[f"embed_{side}"]).requires_grad_(),
            torch.tensor(inputs[f"logits_{side}"]).requires_grad_(),
            torch.tensor(inputs[f"labels_{side}"]),
        )
        for side in ("remain", "forget")
    ]
    return *sides, torch.tensor([inputs["prototypes"][str(c)] for c in range(5)])


def matrices(params, zero_b=False, zero_block=None):
    """The reference matrices of a structure case, in order."""
    found = []
    for i, param in enumerate(params):
        empty = (zero_b and param["name"].endswith("lora_B")) or (zero_block is not None and i // 4 == zero_block)
        values = torch.zeros(param["shape"]) if empty else fill(param["shape"], param["k"], 0.3)
        found.append(values.requires_grad_())
    return found


def blocks(flat, pairs=2):
    """Turn matrices in order into blocks of (A, B)."""
    both = list(zip(flat[::2], flat[1::2], strict=True))
    return [both[i : i + pairs] for i in range(0, len(both), pairs)]


def test_the_filler_gives_its_check_values():
    want = [0.09983341664682815, 0.7263524072764159, 0.9998233542503748, 0.734271313567996]
    near(fill((4,), 0, 1), want, 1e-7)


def test_cross_entropies_equal_the_reference(case):
    retain, forget, _ = batches(case["inputs"])
    near(retain_ce(retain.logits, retain.labels), case["ce_remain"])
    near(retain_ce(forget.logits, forget.labels), case["ce_forget"])
    near(F.cross_entropy(forget.logits, forget.labels, reduction="none"), case["ce_forget_per_sample"])
    for bound, want in case["bounded_forget"].items():
        near(bounded_forget(forget.logits, forget.labels, float(bound)), want)
    for bound, want in case["bounded_forget_if_per_sample_relu_then_mean"].items():
        near(bounded_forget(forget.logits, forget.labels, float(bound), "sample"), want)


def test_prototype_distances_equal_the_reference_in_the_right_direction(case):
    retain, forget, means = batches(case["inputs"])
    near(prototype_kl(retain.features, retain.labels, means), case["proto"]["kl_remain"])
    near(prototype_kl(forget.features, forget.labels, means), case["proto"]["kl_forget"])
    near(prototype_l2(retain.features, retain.labels, means), case["proto"]["l2_remain"])
    near(prototype_l2(forget.features, forget.labels, means), case["proto"]["l2_forget"])
    right, wrong = case["proto"]["direction_check"].values()
    got = prototype_kl(forget.features, forget.labels, means).item()
    assert abs(got - right) < 1e-6 < abs(got - wrong)


def test_class_means_equal_the_reference(case):
    given_ = case["class_means"]
    found = prototypes(torch.tensor(given_["embeds"]), torch.tensor(given_["labels"]))
    near(found, [given_["prototypes"][str(c)] for c in range(3)])


def test_the_objective_equals_the_reference(case):
    retain, forget, means = batches(case["inputs"])
    for one in case["total_cases"]:
        config = ObjectiveConfig(
            beta=one["beta"],
            bound=one["BND"],
            alpha=one["alpha"],
            weight_forget=one["pro_f_weight"],
            weight_retain=one["pro_r_weight"],
            bound_prototype=one["BND_pro"],
        )
        terms = forget_loss(retain, forget, torch.tensor(one["structure"]), means, config)
        near(terms.total, one["total"])
        near(terms.forget, one["forget_term"])
        near(terms.retain, one["retain_term"])
        near(terms.structure, one["structure_term"])
        near(terms.prototype_forget, one["proto_forget_term"])
        near(terms.prototype_retain, one["proto_remain_term"])


def test_the_objective_has_the_reference_gradients(case):
    retain, forget, means = batches(case["inputs"])
    config = ObjectiveConfig(beta=0.15, bound=110.0, alpha=0.0, weight_forget=0.02, weight_retain=0.5)
    terms = forget_loss(retain, forget, torch.zeros(()), means, config)
    terms.total.backward()
    want = case["gradients"]
    near(terms.total, want["total"])
    near(retain.logits.grad, want["d_logits_remain"])
    near(forget.logits.grad, want["d_logits_forget"])
    near(retain.features.grad, want["d_embed_remain"])
    near(forget.features.grad, want["d_embed_forget"], atol=1e-8)


def test_the_detector_term_equals_the_reference(case):
    want = case["detector"]
    logits, onehot = torch.tensor(want["logits"]), torch.tensor(want["onehot"])
    near(2 * focal(logits, onehot, want["num_boxes"]), 2 * want["loss_ce"])
    term = focal_forget(logits, onehot, want["num_boxes"])
    near(term, want["forget_cls_term"])
    total = detector_forget(term, torch.tensor(0.3), torch.tensor(0.4))
    near(total, want["example_total_with_bbox_0.3_giou_0.4"])


def test_focal_by_hand():
    """Logit 0 has p = 1/2: 0.25 * 0.25 * ln 2 where it is the class, 0.75 * 0.25 * ln 2 where not; over 2 boxes."""
    near(focal(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]]), 2), 0.25 * math.log(2) / 2)


@pytest.mark.parametrize("grouping", ["block", "lora", "matrix"])
def test_the_structure_loss_equals_the_reference(sparse, grouping):
    pairs = blocks(matrices(sparse["params"]))
    near(structure(lora_groups(pairs, grouping)), sparse["single_step"][grouping], 1e-6)


def test_block_norms_and_reported_norms_equal_the_reference(sparse):
    pairs = blocks(matrices(sparse["params"]))
    groups = lora_groups(pairs)
    near(structure(groups), sparse["continual"], 1e-6)
    near(structure(groups[:2]), sparse["single_step_first2_layers_block"], 1e-6)
    near(group_norms(groups), sparse["per_block_group_norms"], 1e-6)
    near(reporting_norm(groups), sparse["report_norm_L2_block"], 1e-6)
    near(reporting_norm(groups, 1), sparse["report_norm_L1_block"], 1e-6)
    each = reporting_norm(lora_groups(pairs, "matrix")).reshape(6, 4)
    near(each.T.flatten(), sparse["report_norm_L2_matrix"], 1e-6)  # the reference lists all A of the first layers first


def test_the_structure_gradient_equals_the_reference(sparse):
    flat = matrices(sparse["params"])
    structure(lora_groups(blocks(flat))).backward()
    names = [param["name"] for param in sparse["params"]]
    near(flat[names.index(sparse["grad_example"]["param"])].grad, sparse["grad_example"]["grad"], 1e-6)


def test_fresh_pairs_count_by_their_a_and_leave_b_at_rest(sparse):
    flat = matrices(sparse["params"], zero_b=True)
    loss = structure(lora_groups(blocks(flat)))
    near(loss, sparse["init_like_B_zero"]["single_step_block"], 1e-6)
    loss.backward()
    assert all(not matrix.grad.any() for matrix in flat[1::2])
    assert all(matrix.grad.isfinite().all() for matrix in flat)


def test_a_group_at_exactly_zero_has_a_zero_gradient(sparse):
    flat = matrices(sparse["params"], zero_block=5)
    groups = lora_groups(blocks(flat))
    loss = structure(groups)
    near(loss, sparse["exact_zero_group"]["loss"], 1e-6)
    assert sparse["exact_zero_group"]["grad_is_nan"], "what the reference had here"
    loss.backward()
    for i, group in enumerate(groups):
        for matrix in group:
            assert matrix.grad.isfinite().all()
            assert matrix.grad.any() == (i != 5)


def test_attention_pairs_equal_the_reference(sparse):
    pairs = blocks(matrices(sparse["attention_pos"]["params"]), pairs=1)
    near(structure(lora_groups(pairs)), sparse["attention_pos"]["single_step"], 1e-6)


def test_no_group_has_no_norm():
    assert group_norms([]).shape == reporting_norm([]).shape == (0,)
    assert structure([]).item() == 0.0
    pruned = lora_groups([[(torch.ones(1, 2), torch.ones(2, 1))], []])
    assert group_norms(pruned).tolist() == [2.0, 0.0] and reporting_norm(pruned, 1).tolist() == [4.0, 0.0]
    assert snap(pruned, 0.1) == prox(pruned, 0.1) == (1,)


@pytest.mark.parametrize(("step", "key"), [(0.1, "after_t_0.1"), (0.5, "after_t_0.5"), (2.0, "after_t_2.0")])
def test_prox_equals_the_reference(shared, step, key):
    want = json.loads((shared / "oracles/forget_merge_prox.json").read_text())["prox"]
    start = [fill((2, 6), 2, 0.3), fill((4, 2), 3, 0.3)]
    group = [matrix.clone() for matrix in start]
    near(group_norms([group]), [want["norm"]], 1e-6)
    gone = prox([group], step)
    near(group_norms([group]), [want[key]["norm"]], 1e-6)
    for matrix, before in zip(group, start, strict=True):
        near(matrix, want[key]["scale"] * before, 1e-6)
    assert gone == ((0,) if step == 2.0 else ())


def test_prox_and_snap_by_hand():
    """Norms 5, 1, 0.5 less steps 1, 1, 0.1: 4, exactly 0, 0.4. Below 0.5 lies the last, and the zero."""
    groups = [[torch.tensor([[3.0]]), torch.tensor([[-4.0]])], [torch.tensor([[-1.0]])], [torch.tensor([[0.5]])]]
    assert prox(groups, [1.0, 1.0, 0.1]) == (1,)
    near(group_norms(groups), [4.0, 0.0, 0.4])
    assert snap(groups, 0.5) == (1, 2)
    assert [matrix.item() for group in groups for matrix in group] == pytest.approx([2.4, -3.2, 0.0, 0.0])
    assert not any(torch.signbit(matrix).any() for matrix in (groups[1][0], groups[2][0])), "zeros are +0: same bytes"
    assert snap(groups, 0.0) == ()


def test_a_group_that_is_nan_is_not_hidden():
    groups = [[torch.tensor([[math.nan]])]]
    assert snap(groups, 1.0) == prox(groups, 1.0) == ()
    assert groups[0][0].isnan().all()


def test_bounds_by_hand():
    """Equal logits of 2 classes have CE ln 2; certain ones 0. The mean is ln 2 / 2."""
    logits, labels = torch.tensor([[0.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 0])
    near(bounded_forget(logits, labels, 0.5), 0.5 - math.log(2) / 2)
    near(bounded_forget(logits, labels, 0.5, "sample"), 0.25)
    assert bounded_forget(logits, labels, 0.3).item() == 0.0


def test_a_class_without_features_is_nan():
    found = prototypes(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([2, 2]), 4)
    assert found[2].tolist() == [2.0, 4.0]
    assert found[[0, 1, 3]].isnan().all()


def test_bounded_prototype_stops_at_its_bound():
    features, means = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    kl = prototype_kl(features, torch.tensor([0]), means).item()
    near(bounded_prototype(features, torch.tensor([0]), means, 1.0), 1 - kl)
    assert bounded_prototype(features, torch.tensor([0]), means, kl / 2).item() == 0.0


def test_prototypes_are_needed_only_with_a_weight():
    side = Batch(torch.zeros(1, 2), torch.zeros(1, 3), torch.tensor([0]))
    plain = forget_loss(side, side, torch.zeros(()), None, ObjectiveConfig())
    near(plain.total, math.log(3) + 0.05 * (110 - math.log(3)))
    with pytest.raises(AssertionError, match="needs prototypes"):
        forget_loss(side, side, torch.zeros(()), None, ObjectiveConfig(weight_forget=0.1))


def test_half_precision_is_summed_in_full():
    group = [[torch.full((300, 300), 0.1, dtype=torch.bfloat16)]]
    near(structure(group), 300 * float(torch.tensor(0.1, dtype=torch.bfloat16)), 1e-6)
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert retain_ce(logits, torch.tensor([0])).dtype == torch.float32


def test_small_norms_carry_no_bias():
    """3e-7 and 4e-7 make 5e-7, which an epsilon of 1e-12 in the squares would already double; the slope is 0.6."""
    matrix = torch.tensor([[3e-7, 4e-7]], requires_grad=True)
    norm = structure([[matrix]])
    norm.backward()
    near(norm, 5e-7, 1e-6, atol=0.0)
    near(matrix.grad, [[0.6, 0.8]], 1e-6)


def test_prototypes_carry_no_gradient():
    assert not prototypes(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1])).requires_grad


def test_norms_have_the_gradients_of_float64():
    flat = [fill((2, 3), k, 1.0).double().requires_grad_() for k in range(4)]
    assert torch.autograd.gradcheck(lambda *each: group_norms([each[:2], each[2:]]), flat)


SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.floats(0.0, 20.0))
def test_bounding_each_is_never_less_than_bounding_the_mean(seed, bound):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, 4, generator=generator)
    labels = torch.randint(4, (6,), generator=generator)
    whole, each = bounded_forget(logits, labels, bound), bounded_forget(logits, labels, bound, "sample")
    assert 0 <= whole <= each + 1e-5
    order = torch.randperm(6, generator=generator)
    torch.testing.assert_close(bounded_forget(logits[order], labels[order], bound), whole)


@given(SEEDS)
def test_a_divergence_is_positive_and_zero_at_the_prototype(seed):
    generator = torch.Generator().manual_seed(seed)
    features, means = torch.randn(5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    labels = torch.randint(3, (5,), generator=generator)
    assert prototype_kl(features, labels, means) >= 0
    assert prototype_kl(means[labels] + 7.0, labels, means).abs() < 1e-6
    assert prototype_l2(means[labels], labels, means) == 0


@given(SEEDS, st.floats(0.01, 5.0))
def test_prox_takes_a_step_off_every_norm(seed, step):
    generator = torch.Generator().manual_seed(seed)
    groups = [[torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator)] for _ in range(3)]
    before = group_norms(groups)
    gone = prox(groups, step)
    torch.testing.assert_close(group_norms(groups), F.relu(before - step), rtol=1e-4, atol=1e-6)
    assert gone == tuple(i for i, norm in enumerate(before.tolist()) if norm <= step) == snap(groups, 1e-12)


@given(SEEDS, st.floats(0.1, 10.0))
def test_coarser_groups_have_the_smaller_penalty(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        [(torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator)) for _ in range(2)]
        for _ in range(2)
    ]
    block, lora, matrix = (structure(lora_groups(pairs, grouping)) for grouping in ("block", "lora", "matrix"))
    assert block <= lora <= matrix
    scaled = [[(scale * a, scale * b) for a, b in block_] for block_ in pairs]
    torch.testing.assert_close(structure(lora_groups(scaled)), scale * block)
    torch.testing.assert_close(reporting_norm(lora_groups(pairs)).sum(), matrix)
