"""Small inputs for the stages that sample, select and evaluate."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

from postgrad.alignment.tasks import make_prompt
from postgrad.core.config import DataConfig, ModelConfig, RuntimeConfig
from postgrad.core.models import load_reward_model, save_model
from postgrad.core.runtime import Job

MODEL = ModelConfig(tiny_width=32, tiny_layers=1)


def runtime(folder: Path, seed: int = 0) -> RuntimeConfig:
    """Run quietly on the CPU."""
    return RuntimeConfig(folder=str(folder), seed=seed, device="cpu", quiet=True)


def job(folder: Path, seed: int = 0) -> Job:
    """A job that no one started."""
    folder.mkdir(parents=True, exist_ok=True)
    return Job("test", folder, seed, torch.device("cpu"), torch.float32, 0, 1, True)


def write_prompts(path: Path, num: int) -> DataConfig:
    """Write prompts of the built-in tasks."""
    rng = Random(5)
    rows = [{"messages": make_prompt(rng, error=(0.1, 0.3), slip=0.1)} for _ in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(path=str(path), held_out=1.0, max_length=160)


def write_sets(path: Path, sets: Sequence[tuple[Sequence[str], Sequence[float]]]) -> DataConfig:
    """Write scored responses to prompts of the built-in task "copy"."""
    rows = [
        {"prompt": f"copy {'bdfghk'[i % 6]}a{'lmnprs'[i // 6 % 6]}e", "responses": list(texts), "scores": list(scores)}
        for i, (texts, scores) in enumerate(sets)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(path=str(path), held_out=0.3, max_length=160)


def write_reward_model(folder: Path, seed: int = 0) -> str:
    """Save an untrained tiny reward model."""
    model, tokenizer = load_reward_model(MODEL, job(folder.parent, seed))
    save_model(model, tokenizer, folder)
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file that must not differ between two runs of one config."""
    of_the_day = {"timing.jsonl", "environment.json", "report.html", "sections.json", ".lock", "config.toml"}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in of_the_day)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
