"""LoRA through peft: inject, find the folder of an adapter, merge.

Source: Hu et al. 2021 (arXiv 2106.09685); the formats are peft's own.
"""

from pathlib import Path
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from postgrad.core.config import ModelConfig
from postgrad.errors import ModelError


def add_lora(
    model: PreTrainedModel, config: ModelConfig, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
) -> nn.Module:
    """Freeze the model and add trainable low-rank pairs to its linear layers (all of the blocks by default).

    Raises: ModelError: none of ``lora_targets`` names a linear layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) or "all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    try:
        adapted: nn.Module = get_peft_model(model, settings)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
        raise ModelError(
            f"no LoRA target among {config.lora_targets}: {error}. The model's modules: {names}"
        ) from error
    return adapted


def is_adapter(folder: str) -> bool:
    """Say whether a local folder holds a PEFT adapter rather than a whole model."""
    return (Path(folder) / "adapter_config.json").is_file()


def base_of_adapter(folder: str) -> str:
    """Name the model an adapter belongs to."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise ModelError(f"{folder}/adapter_config.json names no base model; set base_model_name_or_path in it")
    return str(base)


def merge_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Add the adapter of a folder into the weights of its base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, or the model itself."""
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel), f"a transformers model is needed, not a {type(base).__name__}"
    return base
