"""Small rows of text for tests: facts about nobody, tokenised by the byte tokenizer."""

import json
from pathlib import Path

import torch

from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.items import Example, content_hash
from postgrad.core.models import load_lm
from postgrad.core.rows import Tree
from postgrad.core.runtime import Job
from postgrad.core.text import byte_tokenizer, conversation_trees
from postgrad.forgetting.facts import FactSizes, write_facts
from postgrad.forgetting.text_batches import Packing
from postgrad.forgetting.text_losses import TextObjectiveConfig
from postgrad.forgetting.text_measures import measure
from postgrad.forgetting.text_rows import Sources, read_texts, tokenised
from postgrad.forgetting.unlearn import UnlearnConfig
from postgrad.forgetting.unlearn_steps import AdapterConfig, Place, Settings, Task, prepare

PACKING = Packing("tree", 256, 0, 2048)


def job(folder: Path) -> Job:
    """A job on the CPU that says nothing."""
    return Job("unlearn", folder, 0, torch.device("cpu"), torch.float32, 0, 1, True)


def write(path: Path, num: int, first: int = 0) -> str:
    """Write questions with answers of differing lengths."""
    rows = [{"question": f"what is {i}", "answer": "ab " * (1 + i % 3) + str(i)} for i in range(first, first + num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trees(num: int) -> list[Tree]:
    """Tokenise questions with answers of differing lengths."""
    talks = [
        ({"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": "a" * (1 + i % 5)})
        for i in range(num)
    ]
    examples = [Example(content_hash(list(talk)), talk) for talk in talks]
    return conversation_trees(byte_tokenizer(), examples, DataConfig()).items


TINY = ModelConfig(tiny_width=32, tiny_layers=2)
TRAIN = TrainConfig(epochs=15, batch_size=8, eval_every=10, save_every=0, optim=OptimConfig(lr=1e-2))
LEARNING = TrainConfig(epochs=30, batch_size=16, save_every=0, optim=OptimConfig(lr=1e-2))


def unlearning(folder: Path, name: str = "run") -> UnlearnConfig:
    """Few facts, learnt and unlearnt in seconds."""
    paths = write_facts(folder / "facts", 0, FactSizes(forget=2, retain=6, held_out=3))
    return UnlearnConfig(
        forget=str(paths["forget"]),
        retain=str(paths["retain"]),
        held_out=str(paths["held_out"]),
        gold="none",
        model=TINY,
        train=TRAIN,
        learning=LEARNING,
        runtime=RuntimeConfig(folder=str(folder / name), device="cpu", quiet=True),
    )


def prepared(folder: Path, objective: TextObjectiveConfig, held_out: bool = True, train: TrainConfig = TRAIN) -> Task:
    """Put an adapter on a drawn model, with what its steps need."""
    config = unlearning(folder)
    model, tokenizer = load_lm(TINY, job(folder))
    sources = Sources(config.forget, config.retain, config.held_out if held_out else "", 0.1, aside=False)
    found = tokenised(read_texts(sources, DataConfig(), 0), tokenizer, DataConfig(), refuse=True)
    before = {part: measure(model.eval(), rows, PACKING, job(folder)) for part, rows in found.rows.items()}
    place = Place(model, "request-mine", (), PACKING)
    return prepare(place, found, before, Settings(AdapterConfig(), objective, train), 0)
