"""Every method that trains trains in FP8 too, and leaves ordinary folders."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from postgrad.__main__ import main
from postgrad.core.report import TENSORS, read_metrics

FLAGS = ["--precision.min-size", "32", "--max-steps", "4", "--runtime.quiet"]


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_a_method_trains_in_fp8(tmp_path: Path, method: str) -> None:
    folder = tmp_path / method
    watch = ["--precision.watch-every", "2"]
    assert main([method, "--precision.level", "O2", *FLAGS, *watch, "--runtime.folder", str(folder)]) == 0
    assert any(TENSORS in row for row in read_metrics(folder))
    assert json.loads((folder / "result.json").read_text())


def test_adapters_checkpointing_and_bf16_go_together(tmp_path: Path) -> None:
    base, adapted = tmp_path / "base", tmp_path / "adapted"
    assert main(["sft", "--precision.level", "O3", *FLAGS, "--runtime.folder", str(base)]) == 0
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    assert all(type(param) is torch.nn.Parameter and param.dtype == torch.float32 for param in model.parameters())
    adapters = ["--lora-rank", "4", "--gradient-checkpointing", "--runtime.precision", "bf16"]
    source = ["--model.path", str(base / "model"), "--runtime.folder", str(adapted)]
    assert main(["sft", "--precision.level", "O2", *FLAGS, *adapters, *source]) == 0
    assert (adapted / "model" / "adapter_model.safetensors").is_file()
