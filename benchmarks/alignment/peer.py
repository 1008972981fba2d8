"""TRL's side: its trainers on the same ids, with its defaults and with what makes it fastest."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.alignment.data import MAX_LENGTH, PAD, STOP, real_tokens
from benchmarks.alignment.ours import order
from benchmarks.alignment.setting import LR, Measured, Meter, Setting, make_model
from postgrad.core.rows import Tree


@dataclass(frozen=True)
class Peer:
    """Settings of TRL's trainers."""

    checkpointing: bool = True
    """Recompute activations, TRL's default."""
    precompute: bool = False
    """DPO: reference log-probabilities once instead of a reference model at every step."""
    by_length: bool = False
    """Rows sorted by length, longest first, for the reference pass and for training. (`group_by_length` fails in
    TRL's DPO and reward trainers: they drop the lengths. A sorted data set pads as little.)"""
    packing: bool = False
    """SFT: several conversations a row (best fit decreasing), attention kept apart."""
    batch: int = 8
    """Rows a forward pass; 8 is the default."""


PEERS = {
    "trl default": Peer(),
    "trl plain": Peer(checkpointing=False),
    "trl best": Peer(checkpointing=False, precompute=True, by_length=True),
    "trl packed": Peer(checkpointing=False, packing=True, batch=1),
}


class IdsDPOTrainer(DPOTrainer):
    """Takes token ids; TRL's DPO trainer would tokenise texts."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class Watch(TrainerCallback):
    """Times training from its first step to the end of its last, and keeps the losses."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock after the last step."""
        if state.global_step == state.max_steps:
            self.meter.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss."""
        if "loss" in logs:
            self.losses.append(logs["loss"])


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that only knows its special tokens."""
    plain = Tokenizer(WordLevel({"<pad>": PAD, "<stop>": STOP}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<stop>")


def dataset(setting: Setting, peer: Peer, trees: list[Tree]) -> Dataset:
    """Lay the rows out as each trainer wants them: in postgrad's order, or longest first."""
    rows = [_row(setting.task, trees[i]) for i in order(setting, trees)]
    if peer.by_length:
        rows.sort(key=lambda row: -row["length"])
    return Dataset.from_list(rows)


def _row(task: str, tree: Tree) -> dict[str, Any]:
    prompt, answers = list(tree.prompt), [list(answer) for answer in tree.answers]
    if task == "sft":
        labels = [token if mark else -100 for token, mark in zip(prompt, tree.supervised, strict=True)]
        return {"input_ids": prompt, "labels": labels, "length": len(prompt)}
    length = len(prompt) + max(map(len, answers))
    if task == "reward":
        return {"chosen_ids": prompt + answers[0], "rejected_ids": prompt + answers[1], "length": length}
    return {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1], "length": length}


def run(setting: Setting, trees: list[Tree], folder: Path) -> Measured:
    """Train on every row once."""
    peer = PEERS[setting.system]
    rows = dataset(setting, peer, trees)
    meter = Meter(setting, real_tokens(trees))
    model = make_model(setting, "sdpa")
    watch = Watch(meter)
    trainer = _trainer(setting, peer, model, rows, folder, watch)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.train()
    meter.found.losses = watch.losses
    return meter.found


def arguments(setting: Setting, peer: Peer, num: int, folder: Path) -> dict[str, Any]:
    """Give the settings all trainers share."""
    batch = min(setting.peer_batch or peer.batch, setting.batch)
    steps = setting.num // setting.batch
    return {
        "output_dir": str(folder), "per_device_train_batch_size": batch, "num_train_epochs": 1,
        "gradient_accumulation_steps": max(1, round(num / steps / batch)), "max_length": MAX_LENGTH,
        "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0, "seed": setting.seed,
        "gradient_checkpointing": peer.checkpointing, "use_cpu": setting.device == "cpu",
        "bf16": setting.device == "cuda", "report_to": [], "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "train_sampling_strategy": "sequential",
    }  # fmt: skip


def _trainer(setting: Setting, peer: Peer, model: Any, rows: Dataset, folder: Path, watch: Watch) -> Any:
    options = arguments(setting, peer, len(rows), folder)
    both = {"model": model, "train_dataset": rows, "processing_class": tokenizer(), "callbacks": [watch]}
    if setting.task == "reward":
        return RewardTrainer(args=RewardConfig(**options), **both)
    if setting.task == "sft":
        if not peer.packing:
            return SFTTrainer(args=SFTConfig(**options), **both)
        num_rows = -(-sum(rows["length"]) // MAX_LENGTH)
        options = {**arguments(setting, peer, num_rows, folder), "packing": True}
        return SFTTrainer(args=SFTConfig(**options), **both)
    if not peer.precompute:
        reference = make_model(setting, "sdpa").requires_grad_(False)
        return IdsDPOTrainer(ref_model=reference, args=DPOConfig(**options), **both)
    os.environ["TQDM_DISABLE"] = "1"
    with torch.no_grad():
        model(input_ids=torch.tensor([list(rows[0]["prompt_ids"])], device=setting.device))
    watch.meter.start()
    trainer = IdsDPOTrainer(args=DPOConfig(**options, precompute_ref_log_probs=True), **both)
    watch.meter.stop(reference=True)
    return trainer
