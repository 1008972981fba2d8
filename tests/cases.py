"""A tiny case of every method: seconds to run, yet every part of it is used."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from forgotten import DATA, forgotten

from postgrad.alignment.align import AlignConfig
from postgrad.alignment.annotate import AnnotateConfig
from postgrad.alignment.dpo import DPOConfig
from postgrad.alignment.evaluate import EvaluateConfig
from postgrad.alignment.judge import JudgeConfig
from postgrad.alignment.rejection import RejectionConfig
from postgrad.alignment.reward import RewardConfig
from postgrad.alignment.sample import SampleConfig
from postgrad.alignment.sft import SFTConfig
from postgrad.alignment.tasks import TaskSizes, corrupt, make_prompt, score
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, PrecisionConfig, RuntimeConfig, TrainConfig
from postgrad.core.models import load_reward_model, save_model
from postgrad.core.runtime import Job
from postgrad.core.vision import ImagesConfig
from postgrad.core.vision_models import ClassifierConfig
from postgrad.forgetting.bake import BakeConfig
from postgrad.forgetting.base import BaseConfig
from postgrad.forgetting.box_files import BoxesConfig
from postgrad.forgetting.detector import DetectorBaseConfig, DetectorConfig
from postgrad.forgetting.erase_boxes import EraseBoxesConfig
from postgrad.forgetting.erase_config import EraseConfig
from postgrad.forgetting.forget import ForgetConfig
from postgrad.forgetting.forget_boxes import ForgetBoxesConfig
from postgrad.forgetting.leakage_audit import AuditConfig
from postgrad.forgetting.purge import PurgeConfig
from postgrad.forgetting.revoke import RevokeConfig
from postgrad.forgetting.unlearn import UnlearnConfig
from postgrad.forgetting.verify import VerifyConfig
from postgrad.fp8.parity import ParityConfig
from postgrad.fp8.pretrain import PretrainConfig

NUM_PROMPTS = 32
MODEL = ModelConfig(tiny_width=32, tiny_layers=1)
TRAIN = TrainConfig(
    max_steps=20,
    batch_size=8,
    micro_tokens=512,
    log_every=1,
    eval_every=10,
    save_every=6,
    optim=OptimConfig(lr=1e-2, schedule="constant"),
)
RUNTIME = RuntimeConfig(folder="run", seed=3, device="cpu", quiet=True)
RULE = JudgeConfig(kind="rule", noise=0.05)


def case(name: str, folder: Path) -> Any:
    """Write a method's inputs into `folder` and return its configuration; it runs in the working folder."""
    config = CASES[name](folder)
    return replace(config, runtime=replace(RUNTIME, folder="run"))


def data(path: Path, held_out: float = 0.25) -> DataConfig:
    """Point at small data."""
    return DataConfig(path=str(path), held_out=held_out, max_length=128, row_length=128)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts() -> list[list[dict[str, str]]]:
    """Make prompts of the built-in tasks."""
    rng = Random(7)
    return [make_prompt(rng, error=(0.1, 0.3), slip=0.1) for _ in range(NUM_PROMPTS)]


def ranked(messages: list[dict[str, str]], num: int = 4) -> list[tuple[float, str]]:
    """Make answers of differing worth to a prompt, best first."""
    rng = Random(str(messages))
    answers = {corrupt(messages, rng, error=(0.0, 0.9), slip=0.1) for _ in range(num)}
    while len(answers) < num:
        answers.add(corrupt(messages, rng, error=(0.5, 0.9), slip=0.5))
    return sorted(((score(messages, text), text) for text in answers), reverse=True)


def sets(folder: Path) -> Path:
    """Write scored sets of responses."""
    rows = [
        {"prompt": each, "responses": [text for _, text in found], "scores": [value for value, _ in found]}
        for each in prompts()
        if (found := ranked(each))
    ]
    return write(folder / "sets.jsonl", rows)


def pairs(folder: Path) -> Path:
    """Write preference pairs."""
    rows = [
        {"prompt": each, "chosen": found[0][1], "rejected": found[-1][1]}
        for each in prompts()
        if (found := ranked(each))
    ]
    return write(folder / "pairs.jsonl", rows)


def questions(folder: Path, num: int) -> Path:
    """Write prompts without answers."""
    return write(folder / "prompts.jsonl", [{"messages": each} for each in prompts()[:num]])


def reward_model(folder: Path) -> str:
    """Write a tiny reward model as it starts."""
    job = Job("reward", folder, 3, torch.device("cpu"), torch.float32, rank=0, world=1, quiet=True)
    model, tokenizer = load_reward_model(MODEL, job)
    save_model(model, tokenizer, folder / "reward")
    return str(folder / "reward")


def sft(folder: Path) -> SFTConfig:
    """Conversations."""
    rows = [{"messages": [*each, {"role": "assistant", "content": ranked(each)[0][1]}]} for each in prompts()]
    return SFTConfig(model=MODEL, data=data(write(folder / "sft.jsonl", rows)), train=TRAIN)


def annotate(folder: Path) -> AnnotateConfig:
    """Sets whose first two responses a noisy rule compares, a few prompts at a time."""
    return AnnotateConfig(pairing="first", shard=4, judge=RULE, data=data(sets(folder)))


def reward(folder: Path) -> RewardConfig:
    """Preference pairs."""
    return RewardConfig(model=MODEL, data=data(pairs(folder)), train=TRAIN)


def sample(folder: Path) -> SampleConfig:
    """A few short responses to a few prompts, scored."""
    path, rewarder = questions(folder, 8), reward_model(folder)
    return SampleConfig(n=3, max_new_tokens=6, chunk=2, reward=rewarder, model=MODEL, data=data(path))


def rejection(folder: Path) -> RejectionConfig:
    """Scored sets, behind the gate."""
    return RejectionConfig(gate=True, judge=JudgeConfig(kind="rule"), model=MODEL, data=data(sets(folder)), train=TRAIN)


def dpo(folder: Path) -> DPOConfig:
    """Scored sets, of which the best and the worst response make a pair."""
    return DPOConfig(rejected="worst", model=MODEL, data=data(sets(folder)), train=TRAIN)


def evaluate(folder: Path) -> EvaluateConfig:
    """Two policies, a reward model and a rule."""
    path, rewarder = questions(folder, 6), reward_model(folder)
    return EvaluateConfig(
        policies=("first=tiny", "second=tiny"),
        samples=3,
        max_new_tokens=6,
        chunk=2,
        reward=rewarder,
        judge=RULE,
        model=MODEL,
        data=data(path, held_out=1.0),
    )


def align(folder: Path) -> AlignConfig:
    """Every stage, each for a moment."""
    usual = AlignConfig()
    train = replace(TRAIN, max_steps=6, eval_every=0, save_every=4)
    return AlignConfig(
        sizes=TaskSizes(sft=64, candidates=24, set=16, held_out=6),
        gate="warn",
        model=MODEL,
        sft=replace(usual.sft, train=train),
        candidates=replace(usual.candidates, n=3, max_new_tokens=6, chunk=12),
        annotate=replace(usual.annotate, shard=12, min_consistency=0.0),
        reward=replace(usual.reward, train=train),
        sample=replace(usual.sample, n=4, max_new_tokens=6, chunk=8),
        rejection=replace(usual.rejection, train=train),
        dpo=replace(usual.dpo, train=train),
        evaluate=replace(usual.evaluate, samples=3, max_new_tokens=6, chunk=3),
    )


def forget(folder: Path) -> ForgetConfig:
    """A tiny classifier learns digits and serves two requests, one of which is revoked."""
    usual = EraseConfig()
    base = replace(BaseConfig().train, epochs=3, log_every=2)
    erase = replace(usual, select_epochs=1, blocks=1, patience=0, train=replace(usual.train, epochs=2))
    return ForgetConfig(
        tasks=(9, 1, 2),
        share=1.0,
        preset="own",
        gold=False,
        erase=erase,
        base=BaseConfig(train=base),
        audit=AuditConfig(svc=False),
        model=ClassifierConfig(width=32, depth=2, heads=2),
        data=ImagesConfig(limit=200),
    )


def forget_boxes(folder: Path) -> ForgetBoxesConfig:
    """A tiny detector sees shapes for a moment and serves two requests, one of which is revoked."""
    usual, base = EraseBoxesConfig(), DetectorBaseConfig()
    erase = replace(
        usual, select_epochs=1, blocks=1, early=False, floor=100.0, snap=0.0, least_steps=0,
        train=replace(usual.train, epochs=1, batch_size=8, log_every=1),
    )  # fmt: skip
    return ForgetBoxesConfig(
        preset="own",
        revoke=("request-2",),
        erase=erase,
        base=DetectorBaseConfig(train=replace(base.train, epochs=1, batch_size=8, log_every=1)),
        model=DetectorConfig(width=32, queries=4),
        data=BoxesConfig(limit=24),
    )


def verify(folder: Path) -> VerifyConfig:
    """A service of two requests, its base and its images."""
    made = forgotten(folder)
    return VerifyConfig(service=str(made.service), model=ClassifierConfig(path=str(made.model)), data=DATA)


def revoke(folder: Path) -> RevokeConfig:
    """Both requests of a service, in a copy: the service is an input."""
    made = forgotten(folder)
    model = ClassifierConfig(path=str(made.model))
    return RevokeConfig(service=str(made.service), requests=("first", "second"), rehearse=True, model=model, data=DATA)


def bake(folder: Path) -> BakeConfig:
    """Both requests of a service, in a copy."""
    made = forgotten(folder)
    return BakeConfig(service=str(made.service), rehearse=True, model=ClassifierConfig(path=str(made.model)), data=DATA)


def purge(folder: Path) -> PurgeConfig:
    """Three files of a request, in a copy of the service: neither is an input that a run may delete."""
    made = forgotten(folder)
    files = [folder / f"{number}.png" for number in range(3)]
    for file in files:
        file.write_bytes(b"somebody")
    return PurgeConfig(service=str(made.service), request="first", files=tuple(map(str, files)), rehearse=True)


def unlearn(folder: Path) -> UnlearnConfig:
    """Rows of one file, learnt, then a share of them unlearnt in two ways, beside a gold model."""
    rows = [
        {"messages": [*each, {"role": "assistant", "content": found[0][1]}], "perturbed_answer": [found[-1][1]]}
        for each in prompts()
        if (found := ranked(each))
    ]
    return UnlearnConfig(
        share=0.25,
        compare=("npo",),
        model=MODEL,
        data=data(write(folder / "unlearn.jsonl", rows)),
        train=replace(TRAIN, max_steps=40),
        learning=replace(TRAIN, eval_every=0),
    )


def texts(folder: Path) -> Path:
    """Write a few texts, a file each, one of them held out."""
    rng = Random(11)
    for name in ("train/a", "train/b", "validation/c"):
        path = folder / "texts" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = ["the cat", "saw a dog", "and ran", "over the hill", "again"]
        path.write_text("\n".join(" ".join(rng.choices(words, k=6)) for _ in range(40)), encoding="utf-8")
    return folder / "texts"


def pretrain(folder: Path) -> PretrainConfig:
    """A tiny model reads a few texts in FP8."""
    train = replace(TRAIN, precision=replace(PrecisionConfig(), level="O2", min_size=16))
    read = DataConfig(path=str(texts(folder)), max_length=32)
    return PretrainConfig(eval_blocks=8, model=replace(MODEL, tiny_width=48), data=read, train=train)


def parity(folder: Path) -> ParityConfig:
    """Two seeds of a moment each, a candidate and a control."""
    one = pretrain(folder)
    train = replace(one.train, max_steps=6, eval_every=3, save_every=1, precision=PrecisionConfig(min_size=16))
    return ParityConfig(candidates=("O2", "e4m3_v"), num_seeds=2, pretrain=replace(one, train=train))


CASES: dict[str, Callable[[Path], Any]] = {
    "align": align,
    "sft": sft,
    "annotate": annotate,
    "reward": reward,
    "sample": sample,
    "rejection": rejection,
    "dpo": dpo,
    "evaluate": evaluate,
    "forget": forget,
    "forget_boxes": forget_boxes,
    "verify": verify,
    "revoke": revoke,
    "bake": bake,
    "unlearn": unlearn,
    "purge": purge,
    "pretrain": pretrain,
    "parity": parity,
}
