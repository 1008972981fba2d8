"""Finding and naming adapters; what they do to a model is tested in test_models.py."""

import json

import pytest

from postgrad.core.adapters import base_of_adapter, is_adapter
from postgrad.errors import ModelError


def adapter(folder, base):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "task_type": "CAUSAL_LM"})
    )
    return str(folder)


def test_an_adapter_names_its_base(tmp_path):
    assert not is_adapter(str(tmp_path))
    folder = adapter(tmp_path, "some/model")
    assert is_adapter(folder)
    assert base_of_adapter(folder) == "some/model"


def test_an_adapter_without_a_base_is_refused(tmp_path):
    with pytest.raises(ModelError, match="base_model_name_or_path"):
        base_of_adapter(adapter(tmp_path, None))
