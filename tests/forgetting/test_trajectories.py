"""Whole runs on a tiny Face Transformer: against the reference numbers, and against plain float64 arithmetic.

The network, its closed-form weights and images, and both schedules are those of the reference files.
"""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from postgrad.forgetting.face import CosFaceHead, FaceTransformer, FaceTransformerConfig, from_official
from postgrad.forgetting.losses import (
    Batch,
    ObjectiveConfig,
    forget_loss,
    group_norms,
    lora_groups,
    prototypes,
    structure,
)
from postgrad.forgetting.schedules import alpha_schedule, paper_lr

SHAPE = FaceTransformerConfig(
    image_size=20, patch_size=4, width=16, depth=2, heads=2, head_dim=8, ff_width=32, dropout=0.0
)
RANK, SCALING = 4, 0.25
SCALES = {"weight": 0.3, "embed": 0.2, "bias": 0.05, "lora_A": 0.1, "zero": 0.0}
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


def fill(shape, k, scale, base=0.0):
    """The reference files' closed-form tensor, added to a number in float64."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (base + scale * torch.sin(0.7 * i + 0.013 * i * i + 1.3 * k + 0.1)).reshape(shape).float()


@pytest.fixture(scope="module")
def case(shared):
    return json.loads((shared / "oracles/forget_trajectory_single.json").read_text())


def tensors(params):
    """Each parameter's values by its name here."""
    norm = {"ln_weight": (0.1, 1.0)}
    shifts = {kind: (scale, 0.0) for kind, scale in SCALES.items()} | norm
    return {from_official(p["name"]): fill(p["shape"], p["k"], *shifts[p["kind"]]) for p in params}


def adapted(values):
    """Build the network with these values and its LoRA pairs; only the pairs train."""
    network = FaceTransformer(SHAPE, CosFaceHead(16, 6, margin_at_eval=True))
    network.load_state_dict({name: value for name, value in values.items() if "lora" not in name})
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=1, target_modules=["fc1", "fc2"]), network)
    for name, value in values.items():
        if "lora" in name:
            network.get_parameter(f"{name}.default.weight").data.copy_(value)
    return network


def layers(network):
    return [[block.mlp.fc1, block.mlp.fc2] for block in network.blocks]


def pairs(network):
    return [[(part.lora_A["default"].weight, part.lora_B["default"].weight) for part in b] for b in layers(network)]


def seen(network, images, labels):
    features = network.features(images)
    return Batch(features, network.head(features, labels), labels)


def merge(network):
    """Add each pair to its layer's weight, as the released code does before it saves or goes on."""
    for block in layers(network):
        for part in block:
            part.merge()


def optimizer_of(network):
    trainable = [param for param in network.parameters() if param.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)


def epoch_of(network, optimizer, data, means, config):
    """Train one epoch; return the terms of each step before its update."""
    found = []
    for i, (images, labels) in enumerate(zip(*data["remain"], strict=True)):
        j = i % len(data["forget"][0])
        retain, forget = seen(network, images, labels), seen(network, *(side[j] for side in data["forget"]))
        terms = forget_loss(retain, forget, structure(lora_groups(pairs(network))), means, config)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        found.append(terms)
    return found


def train(network, data, means, config, *, epochs, alpha):
    """Train a request; return each epoch's rate, alpha, terms and block norms."""
    optimizer = optimizer_of(network)
    found = []
    for epoch in range(epochs):
        rate = paper_lr(epoch, epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        now = ObjectiveConfig(**{**vars(config), "alpha": alpha(epoch)})
        terms = epoch_of(network, optimizer, data, means, now)
        found.append((rate, now.alpha, terms, group_norms(lora_groups(pairs(network))).tolist()))
    return found


def single_data():
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0]), torch.tensor([4, 5, 4, 5])
    images = fill((9, 3, 20, 20), 100, 1.0), fill((4, 3, 20, 20), 101, 1.0)
    sides = zip(("remain", "forget"), images, labels, (3, 2), strict=True)
    return {name: (x.split(size), y.split(size)) for name, x, y, size in sides}


def means_of(network, data):
    images, labels = (torch.cat([*data["forget"][i], *data["remain"][i]]) for i in (0, 1))
    with torch.no_grad():
        return prototypes(network.features(images), labels, 6)


@pytest.fixture(scope="module")
def single(case):
    """Run the single-step engine once: the network before and after, prototypes and epochs."""
    hyper = case["hyper"]
    config = ObjectiveConfig(
        beta=hyper["beta"],
        bound=hyper["BND"],
        weight_forget=hyper["pro_f"],
        weight_retain=hyper["pro_r"],
        bound_prototype=hyper["BND_pro"],
    )
    network, data = adapted(tensors(case["params"])), single_data()
    before = copy.deepcopy(network)
    means = means_of(network, data)
    alpha = alpha_schedule("paper-single", hyper["alpha_epoch"], hyper["big_alpha"])
    return before, network, means, train(network, data, means, config, epochs=hyper["epochs"], alpha=alpha)


def test_the_first_forward_equals_the_reference(case, single):
    before, data = single[0], single_data()
    batch = seen(before, data["remain"][0][0], data["remain"][1][0])
    want = case["init_forward"]
    torch.testing.assert_close(batch.logits.detach(), torch.tensor(want["logits_first3_remain"]), **TOLERANCE)
    torch.testing.assert_close(batch.features.detach(), torch.tensor(want["embed_first3_remain"]), **TOLERANCE)
    trainable = [param.numel() for param in before.parameters() if param.requires_grad]
    assert sum(trainable) == case["trainable_count"] and len(trainable) == len(case["trainable"])
    assert sum(param.numel() for param in before.parameters()) == case["total_count"]


def test_prototypes_of_a_network_equal_the_reference(case, single):
    want = torch.tensor([case["prototypes"][str(c)] for c in range(6)])
    torch.testing.assert_close(single[2], want, **TOLERANCE)


def test_the_single_step_run_equals_the_reference(case, single):
    for (rate, alpha, steps, norms), want in zip(single[3], case["epochs"], strict=True):
        assert (rate, alpha) == (pytest.approx(want["lr"], rel=1e-9), want["alpha"])
        for terms, step in zip(steps, want["steps"], strict=True):
            got = [terms.forget, terms.retain, terms.structure, terms.prototype_forget, terms.prototype_retain]
            got.append(terms.total.detach())
            assert [term.item() for term in got] == pytest.approx(list(step.values()), rel=2e-4)
        assert norms == pytest.approx(want["block_norms_after"], rel=2e-4)


def test_the_single_step_run_ends_as_the_reference(case, single):
    network, data = single[1], single_data()
    forget = seen(network, *(torch.cat(side) for side in data["forget"]))
    want = case["final_eval_forward"]
    torch.testing.assert_close(forget.logits.detach(), torch.tensor(want["logits_forget"]), **TOLERANCE)
    torch.testing.assert_close(forget.features.detach(), torch.tensor(want["embed_forget"]), **TOLERANCE)
    a, b = pairs(network)[1][0]
    torch.testing.assert_close(a.detach(), torch.tensor(case["merge"]["lora_A"]), **TOLERANCE)
    torch.testing.assert_close(b.detach(), torch.tensor(case["merge"]["lora_B"]), **TOLERANCE)


def test_merging_keeps_the_logits_and_merging_twice_does_not(case, single):
    """A checkpoint that holds the merged weight and the pair, loaded and merged again, is another model."""
    network, data = copy.deepcopy(single[1]), single_data()
    images, labels = (torch.cat(side) for side in data["forget"])
    right = network(images, labels).detach()
    part = network.blocks[1].mlp.fc1
    base, (a, b) = part.base_layer.weight.detach().clone(), pairs(network)[1][0]
    merge(network)
    delta = (part.base_layer.weight - base).detach()
    assert torch.equal(part.base_layer.weight, base + SCALING * b @ a)
    assert delta.norm().item() == pytest.approx(case["merge"]["delta_fro"], rel=2e-4)
    torch.testing.assert_close(network(images, labels).detach(), right, **TOLERANCE)
    again = copy.deepcopy(single[0])
    again.load_state_dict(network.state_dict())
    merge(again)
    wrong = again(images, labels).detach()
    want = case["double_merge_hazard"]
    torch.testing.assert_close(wrong, torch.tensor(want["logits_after_reload_then_eval"]), **TOLERANCE)
    assert (wrong - right).abs().max().item() == pytest.approx(want["max_abs_diff_vs_correct"], abs=2e-4)


# Two requests, one after the other, against the same run in float64 with nothing of the package or of peft.
LAYERS = [[f"blocks.{n}.mlp.{part}" for part in ("fc1", "fc2")] for n in range(2)]
FLAT = [name for names in LAYERS for name in names]
REQUESTS = [([5], [0, 1, 2, 3, 4], 0.2, 0.01), ([4], [0, 1, 2, 3], 0.25, 0.02)]  # forget, remain, beta, w_f
W_R, BOUND, BOUND_PROTOTYPE, ALPHA = 0.001, 105.0, 18.0, 1e-4


def of_classes(classes, num):
    """Return the first images of some classes, the first of each before the second of any."""
    images = [fill((4, 3, 20, 20), 200 + c, 1.0) for c in classes]
    return torch.stack([x[j] for j in range(num) for x in images]), torch.tensor(list(classes) * num)


def request_data(forget, remain):
    sides = {"remain": (of_classes(remain, 2), 4), "forget": (of_classes(forget, 4), 2)}
    return {name: (x.split(size), y.split(size)) for name, ((x, y), size) in sides.items()}


def next_values(values, params):
    """Merge the pairs into the weights and fill new pairs, as between two requests."""
    after = dict(values)
    for layer in FLAT:
        a, b = values[f"{layer}.lora_A"], values[f"{layer}.lora_B"]
        after[f"{layer}.weight"] = values[f"{layer}.weight"] + SCALING * b @ a
    for param in params:
        if "lora" in param["name"]:
            scale = 0.05 if param["kind"] == "lora_A" else 0.0
            after[from_official(param["name"])] = fill(param["shape"], param["k"] + 1000, scale).to(a.dtype)
    return after


def plain_norm(x, v, name):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * v[f"{name}.weight"] + v[f"{name}.bias"]


def plain_mlp(x, v, names):
    one, two = (v[f"{n}.weight"] + SCALING * v[f"{n}.lora_B"] @ v[f"{n}.lora_A"] for n in names)
    hidden = x @ one.T + v[f"{names[0]}.bias"]
    return hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))) @ two.T + v[f"{names[1]}.bias"]


def plain_attention(x, v, name):
    mixed = []
    for at in (0, 8):  # the two heads
        q, k, values = (x @ v[f"{name}.qkv.weight"][i + at : i + at + 8].T for i in (0, 16, 32))
        mixed.append((q @ k.transpose(1, 2) / 4).softmax(-1) @ values)
    return torch.cat(mixed, -1) @ v[f"{name}.output.weight"].T + v[f"{name}.output.bias"]


def plain_features(v, images):
    corners = [(r, c) for r in range(0, 20, 4) for c in range(0, 20, 4)]
    patches = torch.stack([images[:, :, r : r + 4, c : c + 4].permute(0, 2, 3, 1).flatten(1) for r, c in corners], 1)
    tokens = patches.double() @ v["patch_embedding.weight"].T + v["patch_embedding.bias"]
    x = torch.cat([v["class_token"].expand(len(images), 1, 16), tokens], 1) + v["position_embedding"]
    for n, names in enumerate(LAYERS):
        x = x + plain_attention(plain_norm(x, v, f"blocks.{n}.attention_norm"), v, f"blocks.{n}.attention")
        x = x + plain_mlp(plain_norm(x, v, f"blocks.{n}.mlp_norm"), v, names)
    return plain_norm(x[:, 0], v, "norm")


def plain_logits(v, features, labels):
    weight = v["head.weight"]
    lengths = features.square().sum(1).sqrt()[:, None] * weight.square().sum(1).sqrt()
    return 64 * (features @ weight.T / lengths - 0.35 * torch.eye(6, dtype=torch.float64)[labels])


def plain_losses(v, images, labels, means):
    """Cross entropy, and the divergence from the prototypes."""
    features = plain_features(v, images)
    logits = plain_logits(v, features, labels)
    ce = (logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]).mean()
    p, q = means[labels].softmax(1), features.softmax(1)
    return ce, (p * (p / q).log()).sum(1).mean()


def plain_norms(v):
    squares = [[v[f"{n}.lora_{letter}"].square().sum() for n in names for letter in "AB"] for names in LAYERS]
    return torch.stack([torch.stack(each).sum().sqrt() for each in squares])


def plain_adamw(params, grads, moments, step, rate):
    for param, grad, (first, second) in zip(params, grads, moments, strict=True):
        first.mul_(0.9).add_(0.1 * grad)
        second.mul_(0.999).add_(0.001 * grad.square())
        change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        param.data.mul_(1 - rate * 0.05).sub_(rate * change)


def plain_train(v, data, beta, w_f):
    """Train a request for two epochs in place; return each step's total and each epoch's norms in a row."""
    images, labels = (torch.cat([*data["forget"][i], *data["remain"][i]]) for i in (0, 1))
    features = plain_features(v, images).detach()
    rows = [features[labels == c].mean(0) for c in range(6)]  # NaN where a class is not part of the request
    means = torch.stack(rows)
    params = [v[f"{n}.lora_{letter}"].requires_grad_() for n in FLAT for letter in "AB"]
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    totals, norms, step = [], [], 0
    for rate in (0.01, 0.005005):
        for i, (kept, kept_labels) in enumerate(zip(*data["remain"], strict=True)):
            step += 1
            ce_r, kl_r = plain_losses(v, kept, kept_labels, means)
            ce_f, kl_f = plain_losses(v, data["forget"][0][i % 2], data["forget"][1][i % 2], means)
            total = ce_r + beta * (BOUND - ce_f).clamp(min=0) + ALPHA * plain_norms(v).sum()
            total = total + w_f * (BOUND_PROTOTYPE - kl_f).clamp(min=0) + W_R * kl_r
            plain_adamw(params, torch.autograd.grad(total, params), moments, step, rate)
            totals.append(total.item())
        norms += plain_norms(v).tolist()
    return totals, norms


def test_two_requests_in_a_row_equal_plain_float64(case):
    ours = tensors(case["params"])
    plain = {name: value.double() for name, value in ours.items()}
    every = of_classes(range(6), 4)
    for task, (forget, remain, beta, w_f) in enumerate(REQUESTS):
        if task:
            ours, plain = next_values(ours, case["params"]), next_values(plain, case["params"])
        network, data = adapted(ours), request_data(forget, remain)
        config = ObjectiveConfig(
            beta=beta, bound=BOUND, weight_forget=w_f, weight_retain=W_R, bound_prototype=BOUND_PROTOTYPE
        )
        alpha = alpha_schedule("paper-continual")
        epochs = train(network, data, means_of(network, data), config, epochs=2, alpha=alpha)
        totals, norms = plain_train(plain, data, beta, w_f)
        assert [terms.total.item() for _, _, steps, _ in epochs for terms in steps] == pytest.approx(totals, rel=2e-4)
        assert [norm for *_, found in epochs for norm in found] == pytest.approx(norms, rel=2e-4)
        want = plain_logits(plain, plain_features(plain, every[0]), every[1]).detach()
        torch.testing.assert_close(network(*every).detach().double(), want, **TOLERANCE)
        state = zip(FLAT, [pair for block in pairs(network) for pair in block], strict=True)
        ours |= {f"{name}.lora_{x}": part.detach() for name, pair in state for x, part in zip("AB", pair, strict=True)}
        plain = {name: value.detach() for name, value in plain.items()}
