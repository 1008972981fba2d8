"""FP8 in transformers' Trainer: it learns, saves ordinary checkpoints, and goes on from them."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from postgrad.core.config import OptimConfig, PrecisionConfig
from postgrad.errors import ConfigError
from postgrad.fp8.linear import Fp8Linear
from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.trainer import prepared_optimizer, trainer_optimizer

SETTINGS = {"config": OptimConfig(lr=1e-2, beta2=0.95), "precision": PrecisionConfig(level="O2", min_size=32)}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **sizes, **heads))


def train(folder: Path, steps: int, resume: bool = False) -> Trainer:
    data = [{"input_ids": torch.arange(i, i + 16) % 64, "labels": torch.arange(i, i + 16) % 64} for i in range(64)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_steps=5,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        small_llama(), arguments, train_dataset=data, optimizer_cls_and_kwargs=(trainer_optimizer, SETTINGS)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_learns_saves_ordinary_weights_and_goes_on(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 10)
    losses = [row["loss"] for row in straight.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    inner = straight.model
    assert inner is not None and sum(isinstance(module, Fp8Linear) for module in inner.modules()) == 14
    straight.save_model(str(tmp_path / "final"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "final")
    for name, value in loaded.state_dict().items():
        assert type(value) is torch.Tensor and torch.equal(value, inner.state_dict()[name]), name
    train(tmp_path / "stopped", 5)
    resumed = train(tmp_path / "stopped", 10, resume=True)
    assert resumed.model is not None
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, inner.state_dict()[name]), name


def test_a_level_that_all_ranks_step_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="O1 or O2; found O3"):
        prepared_optimizer(small_llama(), precision=PrecisionConfig(level="O3", min_size=32))
    assert isinstance(trainer_optimizer()(small_llama(), **SETTINGS), Fp8AdamW)
