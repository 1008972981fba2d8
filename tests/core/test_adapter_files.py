"""Folders of adapters: what peft makes of one, and why one cannot be read."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from postgrad.core.adapter_files import CONFIG_FILE, WEIGHTS_FILE, StoredAdapter, read_adapter, write_adapter
from postgrad.core.layer_adapters import export_adapter, inject, pairs
from postgrad.errors import ArtefactError

PREFIX = "base_model.model.layer.lora_"


@pytest.fixture
def folder(tmp_path):
    stored = StoredAdapter(2, 1.0, {"layer": (torch.ones(2, 3), torch.zeros(4, 2))})
    write_adapter(tmp_path / "adapter", stored, base="some/model")
    return tmp_path / "adapter"


def test_what_is_written_is_read(folder):
    stored = read_adapter(folder)
    a, b = stored.matrices["layer"]
    assert (stored.rank, stored.alpha) == (2, 1.0)
    assert torch.equal(a, torch.ones(2, 3)) and torch.equal(b, torch.zeros(4, 2))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]


def test_it_is_written_over_what_was_there(folder):
    write_adapter(folder, StoredAdapter(1, 2.5, {"other": (torch.ones(1, 3), torch.ones(4, 1))}), base="")
    stored = read_adapter(folder)
    assert list(stored.matrices) == ["other"] and stored.alpha == 2.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("rank_pattern", {"layer": 3}),
        ("modules_to_save", ["head"]),
        ("r", None),
    ],
)
def test_what_is_no_plain_lora_is_refused(folder, key, value):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {key: value}))
    with pytest.raises(ArtefactError, match=f"plain LoRA.*{key}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {f"{PREFIX}A.weight": torch.ones(2, 3)},
        {f"{PREFIX}A.weight": torch.ones(2, 3, 1, 1), f"{PREFIX}B.weight": torch.ones(4, 2)},
        {f"{PREFIX}A.weight": torch.ones(2, 3), f"{PREFIX}B.weight": torch.full((4, 2), torch.nan)},
        {f"{PREFIX}A.weight": torch.ones(2, 3), f"{PREFIX}B.weight": torch.ones(4, 2), "head": torch.ones(1, 1)},
    ],
    ids=["nothing", "half", "convolution", "not-a-number", "more"],
)
def test_matrices_that_are_missing_or_odd_are_refused(folder, tensors):
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(ArtefactError, match="expected"):
        read_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_broken_or_missing_file_is_named(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(ArtefactError, match=name):
        read_adapter(folder)
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=name):
        read_adapter(folder)


def test_a_layer_whose_name_ends_like_anothers_gets_nothing(tmp_path):
    """peft takes a listed name for an ending too: "fc" alone would reach "tower.fc"."""
    from peft import PeftModel

    def draw():
        torch.manual_seed(0)
        return nn.ModuleDict({"tower": nn.ModuleDict({"fc": nn.Linear(3, 3)}), "fc": nn.Linear(3, 3)})

    model = draw()
    inject(model, "first", ["fc"], rank=2, alpha=1)
    assert list(pairs(model, "first")) == ["fc"]
    export_adapter(model, "first", tmp_path / "adapter", base="")
    loaded = PeftModel.from_pretrained(draw(), tmp_path / "adapter")
    assert {key for key in loaded.state_dict() if ".lora_" in key} == {
        f"base_model.model.fc.lora_{m}.default.weight" for m in "AB"
    }
