"""The data behind an empty data.path: conversations, judged pairs and scored sets made of the built-in tasks."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from postgrad.alignment.tasks import SCHEMA, TaskSizes, corrupt, score, write_tasks
from postgrad.core.config import DataConfig
from postgrad.core.distributed import first_rank
from postgrad.core.runtime import stage_seed

NUM_RESPONSES = 8
Kind = Literal["sft", "set", "held_out", "pairs", "sets"]
"""Conversations; prompts for the set; prompts no stage trains on; judged pairs; scored sets."""
MESSAGES = SCHEMA.field("messages").type
PAIRS = pa.schema([("prompt", MESSAGES), ("chosen", pa.string()), ("rejected", pa.string()), ("margin", pa.float64())])
SETS = pa.schema([("prompt", MESSAGES), ("responses", pa.list_(pa.string())), ("scores", pa.list_(pa.float64()))])


def with_data(data: DataConfig, kind: Kind, folder: Path, seed: int) -> DataConfig:
    """Return the settings with a path: the user's, or that of built-in data written below the run folder."""
    if data.path:
        return data
    path = first_rank(lambda: _write(kind, folder / "tasks", seed))
    return replace(data, path=str(path))


def _write(kind: Kind, folder: Path, seed: int) -> Path:
    # The other files do not depend on how many conversations there are, and those take longest to make.
    paths = write_tasks(folder, seed, TaskSizes() if kind == "sft" else TaskSizes(sft=0))
    if kind in paths:
        return paths[kind]
    rng = Random(stage_seed(seed, "built-in", kind))
    rows = []
    for row in pq.read_table(paths["candidates"]).to_pylist():
        prompt = row["messages"]
        answers = {corrupt(prompt, rng, error=(0.1, 0.9), slip=0.1) for _ in range(NUM_RESPONSES)}
        ranked = sorted(((score(prompt, text), text) for text in answers), reverse=True)
        best, worst = ranked[0], ranked[-1]
        if kind == "sets":
            scores, texts = zip(*ranked, strict=True)
            rows.append({"prompt": prompt, "responses": list(texts), "scores": list(scores)})
        elif best[0] > worst[0]:
            gap = best[0] - worst[0]
            rows.append({"prompt": prompt, "chosen": best[1], "rejected": worst[1], "margin": gap})
    path = folder / f"{kind}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS if kind == "pairs" else SETS), path)
    return path
