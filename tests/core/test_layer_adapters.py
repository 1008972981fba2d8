"""Adapters by exact names: the sum, the draw, revocation bit for bit, pruning, baking, and what peft makes of them."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import inputs, network, outputs
from torch import nn

from postgrad.core.layer_adapters import (
    REINITIAL_GAIN,
    activate,
    active_names,
    adapter_names,
    bake,
    baked,
    base_state,
    delta,
    drop,
    export_adapter,
    fingerprint,
    import_adapter,
    initialise,
    inject,
    linear_layers,
    pairs,
    prune,
)
from postgrad.errors import ArtefactError, ModelError

VIT = [f"vit.layers.{k}.mlp.{fc}" for k in range(3) for fc in ("fc1", "fc2")]
LAYERS = {
    "vit": VIT,
    "llama": [f"model.layers.{k}.mlp.{part}_proj" for k in range(3) for part in ("gate", "up", "down")],
    "gpt2": [f"transformer.h.{k}.mlp.{part}" for k in range(3) for part in ("c_fc", "c_proj")],
}


def fill(shape, k, s):
    """The reference data's filler: s sin(0.7 i + 0.013 i^2 + 1.3 k + 0.1), by flat index i."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (s * torch.sin(0.7 * i + 0.013 * i * i + 1.3 * k + 0.1)).float().reshape(shape)


def adapted(name="vit", adapters=("first",), rank=2, alpha=1.0):
    """Draw a network with adapters whose B is not 0, none of them active."""
    model = network(name)
    for number, key in enumerate(adapters):
        inject(model, key, LAYERS[name], rank=rank, alpha=alpha)
        initialise(model, key, seed=number)
        stir(model, key, number)
    return model


def stir(model, key, number=0):
    generator = torch.Generator().manual_seed(100 + number)
    with torch.no_grad():
        for _, b in pairs(model, key).values():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.5)


def logits(model, name="vit"):
    with torch.no_grad():
        return outputs(model, inputs(name))


def bits(state):
    return {key: tensor.clone() for key, tensor in state.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", LAYERS)
def test_a_new_adapter_leaves_the_outputs_as_they_are(name):
    model = network(name)
    before = logits(model, name)
    inject(model, "first", LAYERS[name], rank=8, alpha=1)
    activate(model, ["first"], trainable="first")
    assert torch.equal(logits(model, name), before)
    layer = model.get_submodule(LAYERS[name][0])
    assert layer.scaling == {"first": 0.125}
    assert list(pairs(model, "first")) == LAYERS[name]


def test_the_sum_and_the_baked_weight_are_the_references(shared):
    """W + (alpha / R) B A with alpha / R = 1/2, against the official layer's numbers."""
    oracle = json.loads((shared / "oracles" / "forget_merge_prox.json").read_text())["linear"]
    model = nn.Sequential(nn.Linear(6, 4))
    inject(model, "first", ["0"], rank=2, alpha=1)
    activate(model, ["first"])
    a, b = pairs(model, "first")["0"]
    with torch.no_grad():
        model[0].base_layer.weight.copy_(fill((4, 6), 0, 1))
        model[0].base_layer.bias.copy_(fill((4,), 1, 0.5))
        a.copy_(fill((2, 6), 2, 0.3))
        b.copy_(fill((4, 2), 3, 0.3))
    torch.testing.assert_close(model(fill((3, 6), 4, 1)), torch.tensor(oracle["y_unmerged"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(delta(model, "first")["0"], torch.tensor(oracle["delta"]), rtol=1e-6, atol=1e-7)
    expected = model[0].base_layer.weight + 0.5 * (b @ a)
    bake(model, ["first"])
    assert torch.equal(model[0].weight, expected)
    torch.testing.assert_close(model[0].weight, torch.tensor(oracle["merged_weight"]), rtol=1e-6, atol=1e-6)


def test_the_draw_is_uniform_within_its_bound():
    """A block of the published face network: four matrices, norm 2.309 at first and 0.792 later, all of it from A.

    By hand: two A of 8 I numbers with variance (gain^2 / I) / 3 each, so a norm of sqrt(2 x 8 / 3) gain.
    """
    model = nn.ModuleDict({"fc1": nn.Linear(512, 2048), "fc2": nn.Linear(2048, 512)})
    inject(model, "first", ["fc1", "fc2"], rank=8, alpha=1)
    for gain, expected in ((1.0, 2.309401), (REINITIAL_GAIN, 0.792118)):
        initialise(model, "first", seed=3, gain=gain)
        norm = math.sqrt(sum(m.square().sum().item() for pair in pairs(model, "first").values() for m in pair))
        assert norm == pytest.approx(expected, rel=0.02)
        for a, b in pairs(model, "first").values():
            bound = gain / math.sqrt(a.shape[1])
            assert 0.99 * bound < a.abs().max() <= bound and not b.any()
    assert round(REINITIAL_GAIN, 6) == 0.342997


def test_a_layers_draw_depends_on_the_seed_and_its_name_only():
    model = adapted()
    initialise(model, "first", seed=5)
    whole = {key: a.clone() for key, (a, _) in pairs(model, "first").items()}
    inject(model, "second", VIT[2:4], rank=2, alpha=1)
    initialise(model, "second", seed=5)
    for key, (a, _) in pairs(model, "second").items():
        assert torch.equal(a, whole[key])
    initialise(model, "second", seed=6)
    assert not torch.equal(pairs(model, "second")[VIT[2]][0], whole[VIT[2]])
    assert not torch.equal(whole[VIT[0]], whole[VIT[2]])


def test_torchs_generator_is_left_alone():
    model = network("vit")
    before = torch.random.get_rng_state()
    inject(model, "first", VIT, rank=2, alpha=1)
    initialise(model, "first", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", LAYERS)
def test_revocation_is_exact(name):
    model = network(name)
    base, before = logits(model, name), bits(model.state_dict())
    inject(model, "first", LAYERS[name], rank=2, alpha=1)
    stir(model, "first")
    activate(model, ["first"])
    first = logits(model, name)
    inject(model, "second", LAYERS[name][2:], rank=4, alpha=3)
    stir(model, "second", 1)
    activate(model, ["first", "second"], trainable="second")
    both = logits(model, name)
    assert not torch.equal(first, base) and not torch.equal(both, first)
    activate(model, ["first"])
    assert torch.equal(logits(model, name), first)
    activate(model, ["first", "second"])
    assert torch.equal(logits(model, name), both)
    drop(model, "second")
    assert active_names(model) == ("first",) and torch.equal(logits(model, name), first)
    activate(model, [])
    assert torch.equal(logits(model, name), base)
    drop(model, "first")
    assert torch.equal(logits(model, name), base) and same(bits(model.state_dict()), before)
    assert adapter_names(model) == () and not any(p.requires_grad for p in model.parameters())


def test_only_the_trainable_adapter_gets_gradients():
    model = adapted(adapters=("first", "second", "third"))
    activate(model, ["first", "third"], trainable="third")
    logits_ = outputs(model, inputs("vit"))
    logits_.square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == {f"{key}.lora_{m}.third.weight" for key in VIT for m in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == with_gradient


def test_a_new_adapter_changes_neither_what_is_active_nor_what_trains():
    model = adapted(adapters=("first", "second"))
    activate(model, ["first", "second"], trainable="second")
    before = logits(model)
    inject(model, "third", [*VIT, "classifier"], rank=2, alpha=1)
    stir(model, "third")
    assert active_names(model) == ("first", "second") and torch.equal(logits(model), before)
    assert all(p.requires_grad == (".second." in name) for name, p in model.named_parameters())


def test_pruning_takes_layers_off_and_nothing_else():
    model = adapted(adapters=("first", "second"))
    activate(model, ["first", "second"], trainable="second")
    with torch.no_grad():
        for key in VIT[:2]:
            pairs(model, "second")[key][1].zero_()
    before, first = logits(model), fingerprint(model, "first")
    prune(model, "second", VIT[:2])
    assert torch.equal(logits(model), before) and fingerprint(model, "first") == first
    assert list(pairs(model, "second")) == VIT[2:] and list(pairs(model, "first")) == VIT
    assert all(p.requires_grad == (".second." in name) for name, p in model.named_parameters())
    drop(model, "first")
    assert isinstance(model.get_submodule(VIT[0]), nn.Linear)
    prune(model, "second", VIT[2:])
    assert adapter_names(model) == ("second",) and active_names(model) == ("second",) and not pairs(model, "second")
    with pytest.raises(ModelError, match="not on"):
        prune(model, "second", VIT[:1])


@given(st.permutations(["one", "two", "three"]), st.permutations(["one", "two", "three"]))
def test_the_base_is_the_same_after_any_order_of_requests(come, go):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = bits(model.state_dict())
    for number, key in enumerate(come):
        inject(model, key, ["0", "2"] if key != "two" else ["2"], rank=1, alpha=1)
        stir(model, key, number)
        assert same(base_state(model), before)
    for key in go:
        drop(model, key)
        assert same(base_state(model), before)
    assert same(dict(model.state_dict()), before)


def test_the_layers_of_a_network_keep_their_names():
    model = adapted()
    assert list(linear_layers(model)) == list(linear_layers(network("vit")))
    assert same(base_state(model), dict(network("vit").state_dict()))


def test_a_copy_has_adapters_of_its_own():
    model = adapted()
    activate(model, ["first"])
    twin = copy.deepcopy(model)
    before = logits(model)
    drop(model, "first")
    assert adapter_names(twin) == ("first",) and torch.equal(logits(twin), before)


def test_half_precision_networks_have_adapters_in_full_precision():
    model = network("vit").bfloat16()
    inject(model, "first", VIT, rank=2, alpha=1)
    stir(model, "first")
    activate(model, ["first"])
    assert {m.dtype for pair in pairs(model, "first").values() for m in pair} == {torch.float32}
    weight, added = model.get_submodule(VIT[0]).base_layer.weight.clone(), delta(model, "first")[VIT[0]]
    bake(model, ["first"])
    assert torch.equal(model.get_submodule(VIT[0]).weight, (weight.float() + added).bfloat16())


def test_names_that_cannot_be_are_refused():
    model = adapted()
    for name in ("", "a.b", "keys", "a b"):
        with pytest.raises(ModelError, match="name"):
            inject(model, name, VIT, rank=2, alpha=1)
    with pytest.raises(ModelError, match="already"):
        inject(model, "first", VIT, rank=2, alpha=1)
    with pytest.raises(ModelError, match=r"layers\.N\.mlp\.fcN"):
        inject(model, "second", ["vit.layers.9.mlp.fc1"], rank=2, alpha=1)
    with pytest.raises(ModelError, match="linear layers"):
        inject(model, "second", [], rank=2, alpha=1)
    with pytest.raises(ModelError, match="rank"):
        inject(model, "second", VIT, rank=0, alpha=1)
    assert adapter_names(model) == ("first",)


def test_what_cannot_be_activated_is_refused():
    model = adapted(adapters=("first", "second"))
    for names, trainable in ((["third"], ""), (["first", "first"], ""), (["first"], "second")):
        with pytest.raises(ModelError):
            activate(model, names, trainable)
    for call in (pairs, delta, drop):
        with pytest.raises(ModelError, match="no adapter named"):
            call(model, "third")


@pytest.mark.parametrize("name", LAYERS)
def test_baking_writes_the_sum_and_only_once(name):
    model = adapted(name, ("first", "second"))
    weights = {key: model.get_submodule(key).base_layer.weight.clone() for key in LAYERS[name]}
    added = [delta(model, key) for key in ("first", "second")]
    activate(model, ["first", "second"])
    before, rest = logits(model, name), bits(base_state(model))
    bake(model, ["first", "second"])
    for key, weight in weights.items():
        assert torch.equal(model.get_submodule(key).weight, weight + added[0][key] + added[1][key])
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, rest[key])}
    assert changed == {f"{key}.weight" for key in weights} and list(model.state_dict()) == list(rest)
    torch.testing.assert_close(logits(model, name), before, rtol=1e-4, atol=1e-4)
    assert list(baked(model)) == ["first", "second"] and adapter_names(model) == ()
    with pytest.raises(ArtefactError, match="twice"):
        bake(model, ["first"])


def test_a_baked_adapter_cannot_come_back(tmp_path):
    model = adapted(adapters=("first", "second"))
    export_adapter(model, "first", tmp_path / "adapter", base="vit")
    bake(model, ["first"])
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert baked(again) == baked(model)
    for one in (model, again):
        with pytest.raises(ArtefactError, match="twice"):
            import_adapter(one, tmp_path / "adapter", "another")
        assert "another" not in adapter_names(one)
    plain = nn.Sequential(nn.Linear(2, 2))
    inject(plain, "first", ["0"], rank=1, alpha=1)
    bake(plain, ["first"])
    assert list(baked(plain)) == ["first"]


def test_baking_stops_before_it_writes_what_is_not_finite():
    model = adapted(adapters=("first", "second"))
    before = bits(base_state(model))
    with torch.no_grad():
        pairs(model, "second")[VIT[3]][1][0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.fc2"):
        bake(model, ["first", "second"])
    assert same(base_state(model), before) and adapter_names(model) == ("first", "second")


@pytest.mark.parametrize("name", LAYERS)
def test_peft_reads_what_is_exported(name, tmp_path):
    from peft import PeftModel

    model = adapted(name, rank=4, alpha=2)
    prune(model, "first", LAYERS[name][:3])
    activate(model, ["first"])
    expected = logits(model, name)
    export_adapter(model, "first", tmp_path / "adapter", base="some/model")
    loaded = PeftModel.from_pretrained(network(name), tmp_path / "adapter")
    assert torch.equal(logits(loaded, name), expected)
    with_pairs = {key.split(".lora_")[0] for key in loaded.state_dict() if ".lora_" in key}
    assert with_pairs == {f"base_model.model.{key}" for key in LAYERS[name][3:]}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(LAYERS[name][3:])
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (4, 2, 0.0, "none")
    assert config["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_adapter_comes_back_bit_for_bit(name, tmp_path):
    model = adapted(name)
    prune(model, "first", LAYERS[name][1:4])
    activate(model, ["first"])
    export_adapter(model, "first", tmp_path / "one", base="some/model")
    other = network(name)
    import_adapter(other, tmp_path / "one", "renamed")
    assert active_names(other) == () and torch.equal(logits(other, name), logits(network(name), name))
    activate(other, ["renamed"])
    assert torch.equal(logits(other, name), logits(model, name))
    assert fingerprint(other, "renamed") == fingerprint(model, "first")
    export_adapter(other, "renamed", tmp_path / "two", base="some/model")
    export_adapter(other, "renamed", tmp_path / "two", base="some/model")  # over what is there
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


def test_mixed_kinds_of_layers_are_refused():
    gpt2 = network("gpt2")
    with pytest.raises(ModelError, match="Conv1D"):
        inject(gpt2, "first", ["transformer.h.0.mlp.c_fc", "lm_head"], rank=2, alpha=1)


def test_an_adapter_without_layers_is_not_exported(tmp_path):
    model = adapted()
    prune(model, "first", VIT)
    with pytest.raises(ArtefactError, match="no layer left"):
        export_adapter(model, "first", tmp_path / "adapter", base="")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_model_is_refused(tmp_path):
    export_adapter(adapted("llama"), "first", tmp_path / "llama", base="")
    model = network("vit")
    before = bits(model.state_dict())
    with pytest.raises(ArtefactError, match=r"model\.layers\.N\.mlp\.gate_proj"):
        import_adapter(model, tmp_path / "llama", "first")
    wide = nn.ModuleDict({"vit": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict()})])})})
    wide["vit"]["layers"][0]["mlp"]["fc1"] = nn.Linear(7, 7)
    inject(wide, "first", ["vit.layers.0.mlp.fc1"], rank=2, alpha=1)
    export_adapter(wide, "first", tmp_path / "wide", base="")
    with pytest.raises(ArtefactError, match="another model"):
        import_adapter(model, tmp_path / "wide", "first")
    assert same(dict(model.state_dict()), before)
