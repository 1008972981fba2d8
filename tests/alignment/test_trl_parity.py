"""Losses and gradients through packed, prefix-shared rows equal those of TRL's trainers on the same rows.

TRL pads one sequence a row; here prompts stand once and several trees share a row, so equality covers tokenisation,
masks, positions, packing, log-probabilities and losses at once. Bars: 1e-5 on losses, 1e-4 on gradients.
"""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgrad.alignment.logratios import Logprobs, length_desensitised
from postgrad.alignment.preference import LOSSES, LossSettings, preference_loss
from postgrad.alignment.reward import reward_loss
from postgrad.core.config import DataConfig
from postgrad.core.items import Example
from postgrad.core.models import sequence_logprobs, sequence_scores, target_logprobs, target_nll
from postgrad.core.rows import Rows, pack
from postgrad.core.text import answer_trees, byte_tokenizer, conversation_trees

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("trl")]

LOSS_BAR, GRADIENT_BAR = 1e-5, 1e-4
QUESTIONS = ("copy lomak", "reverse it, please", "hi", "count from d and p", "double mak", "what?")
CHOSEN = ("lomak", "kamol is the word", "ho", "defpqr", "mmaakk", "a rather longer answer than the others")
REJECTED = ("loma", "kam", "hello there, how are you", "d", "mak mak", "no")
SHARED = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down", "nca_pair", "bco_pair",
          "sppo_hard", "aot", "aot_unpaired", "exo_pair", "discopop")  # fmt: skip
SMOOTHED = {"robust": 0.1, "exo_pair": 0.1, "aot": 0.2, "aot_unpaired": 0.2}


def user(text: str) -> list[dict[str, str]]:
    """A prompt of one turn."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    """An answer."""
    return [{"role": "assistant", "content": text}]


def tiny_config(**more: Any) -> Any:
    """A 2-layer Llama with the byte tokenizer's vocabulary."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=256, initializer_range=0.2, **more,
    )  # fmt: skip


def options(folder: Path) -> dict[str, Any]:
    """What every TRL trainer is told."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 6, "use_cpu": True, "report_to": [], "bf16": False,
        "gradient_checkpointing": False, "max_length": 128, "disable_tqdm": True,
    }  # fmt: skip


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Hand out and clear a model's gradients."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Losses and every gradient within the bars: of the value, as float32 rounds, where it is above 1."""
    assert ours[0].item() == pytest.approx(theirs[0].item(), abs=LOSS_BAR, rel=LOSS_BAR)
    assert ours[1].keys() == theirs[1].keys()
    scale = {name: max(1.0, grad.abs().max().item()) for name, grad in theirs[1].items()}
    worst = {name: (ours[1][name] - grad).abs().max().item() / scale[name] for name, grad in theirs[1].items()}
    assert max(worst.values()) < GRADIENT_BAR, max(worst, key=lambda name: worst[name])


def packed(trees: list[Any], layout: Any = "tree") -> Rows:
    """Two or three trees a row."""
    return pack(trees, range(len(trees)), row_length=112, layout=layout, pad_id=256)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A policy and a reference that differ."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    policy = LlamaForCausalLM(tiny_config())
    reference = copy.deepcopy(policy).requires_grad_(False)
    for parameter in reference.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    return policy, reference


@pytest.fixture(scope="module")
def dpo(models: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Rows]]:
    """TRL's DPO trainer, its batch, and our rows of the same pairs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list(
        [{"prompt": user(q), "chosen": assistant(w), "rejected": assistant(r)}
         for q, w, r in zip(QUESTIONS, CHOSEN, REJECTED, strict=True)]
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            models[0], models[1], args=DPOConfig(**options(tmp_path_factory.mktemp("dpo")), beta=0.3),
            train_dataset=data, processing_class=byte_tokenizer(),
        )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(QUESTIONS))])
    pairs = [(user(q), (w, r)) for q, w, r in zip(QUESTIONS, CHOSEN, REJECTED, strict=True)]
    trees, kept, _ = answer_trees(byte_tokenizer(), pairs, DataConfig(max_length=128))
    assert list(kept) == list(range(len(pairs)))
    yield trainer, batch, packed(trees)


def logprobs(models: tuple[Any, Any], rows: Rows, alpha: float = 1.0) -> Logprobs:
    """Our log-probabilities of the pairs under policy and reference."""
    lengths = rows.lengths.view(-1, 2)
    sums = [length_desensitised(target_logprobs(m, rows), rows.sequence, lengths, alpha=alpha) for m in models]
    if alpha == 1.0:
        sums = [sequence_logprobs(model, rows).view(-1, 2) for model in models]
    return Logprobs(sums[0], sums[1], lengths)


def theirs(dpo: tuple[Any, Any, Rows], name: str, **settings: float) -> tuple[Tensor, dict[str, Tensor]]:
    """TRL's loss and gradients under one loss type; the trainer reads these attributes at every call."""
    trainer, batch, _ = dpo
    trainer.loss_types, trainer.loss_weights = [name], [1.0]
    trainer.beta, trainer.label_smoothing = 0.3, settings.get("smoothing", 0.0)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss, gradients(trainer.model)


def ours(models: tuple[Any, Any], batch: Logprobs, name: str, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Our loss and gradients."""
    loss = preference_loss(name, batch, LossSettings(beta=0.3, **settings)).mean()
    loss.backward()
    return loss, gradients(models[0])


def test_tokens_are_the_same(dpo: tuple[Any, Any, Rows]) -> None:
    """Every tree holds TRL's prompt and completion tokens, the stop token included."""
    trainer, _, rows = dpo
    found = [rows.target[rows.sequence == s].tolist() for s in range(rows.num_sequences)]
    wanted = [trainer.train_dataset[i][side] for i in range(len(QUESTIONS)) for side in ("chosen_ids", "rejected_ids")]
    assert found == wanted
    assert rows.num_tokens == sum(
        len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset
    )


@pytest.mark.parametrize("name", SHARED)
def test_preference_losses(dpo: tuple[Any, Any, Rows], models: tuple[Any, Any], name: str) -> None:
    """Fourteen of TRL's fifteen loss types; the fifteenth is below."""
    settings = {"smoothing": SMOOTHED[name]} if name in SMOOTHED else {}
    assert_same(ours(models, logprobs(models, dpo[2]), name, **settings), theirs(dpo, name, **settings))


def test_flat_layout(dpo: tuple[Any, Any, Rows], models: tuple[Any, Any]) -> None:
    """One sequence a row gives the same."""
    pairs = [(user(q), (w, r)) for q, w, r in zip(QUESTIONS, CHOSEN, REJECTED, strict=True)]
    trees, _, _ = answer_trees(byte_tokenizer(), pairs, DataConfig(max_length=128))
    assert_same(ours(models, logprobs(models, packed(trees, "flat")), "sigmoid"), theirs(dpo, "sigmoid"))


def test_sft_term(dpo: tuple[Any, Any, Rows], models: tuple[Any, Any]) -> None:
    """TRL averages over the batch's tokens, we over each answer's: weighted by length they agree."""
    batch = logprobs(models, dpo[2])
    assert batch.lengths is not None
    loss = preference_loss("sft", batch, LossSettings()) @ batch.lengths[:, 0].float() / batch.lengths[:, 0].sum()
    loss.backward()
    assert_same((loss, gradients(models[0])), theirs(dpo, "sft"))


@pytest.mark.parametrize(
    ("theirs_is", "ours_is", "alpha"),
    [("forward_kl", "forward_kl", 0.0), ("js_divergence", "js", 0.0), ("alpha_divergence", "alpha:0.5", 0.5)],
)
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_divergences(
    dpo: tuple[Any, Any, Rows], models: tuple[Any, Any], name: str, theirs_is: str, ours_is: str, alpha: float
) -> None:
    """The f-divergences of the same trainer."""
    trainer = dpo[0]
    trainer.f_divergence_type, trainer.f_alpha_divergence_coef = theirs_is, alpha
    try:
        expected = theirs(dpo, name)
    finally:
        trainer.f_divergence_type = "reverse_kl"
    assert_same(ours(models, logprobs(models, dpo[2]), name, divergence=ours_is), expected)


def test_length_desensitised(dpo: tuple[Any, Any, Rows], models: tuple[Any, Any]) -> None:
    """LD-DPO with alpha 0.3."""
    dpo[0].ld_alpha = 0.3
    try:
        expected = theirs(dpo, "sigmoid")
    finally:
        dpo[0].ld_alpha = None
    assert_same(ours(models, logprobs(models, dpo[2], alpha=0.3), "sigmoid"), expected)


def test_simpo_cpo_orpo_formulas(dpo: tuple[Any, Any, Rows], models: tuple[Any, Any]) -> None:
    """TRL's experimental loss functions on our log-probabilities."""
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    batch = logprobs(models, dpo[2])
    mean = batch.mean_policy.detach()
    self = SimpleNamespace(
        beta=2.0, label_smoothing=0.1, alpha=0.0, simpo_gamma=0.7, loss_type="simpo",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    settings = LossSettings(beta=2.0, smoothing=0.1, gamma=0.7)
    simpo = CPOTrainer.cpo_loss(self, mean[:, 0], mean[:, 1])[0]
    torch.testing.assert_close(preference_loss("simpo", batch, settings).detach(), simpo)
    self.loss_type = "sigmoid"
    cpo = CPOTrainer.cpo_loss(self, *batch.policy.detach().unbind(1))[0]
    torch.testing.assert_close(preference_loss("cpo", batch, settings).detach(), cpo - mean[:, 0])
    orpo = ORPOTrainer.odds_ratio_loss(self, mean[:, 0], mean[:, 1])[0]  # to be taken from the likelihood term
    torch.testing.assert_close(preference_loss("orpo", batch, settings).detach(), -mean[:, 0] - orpo)


def test_every_trl_loss_is_covered() -> None:
    """At least 12 of the family, and none under another name."""
    assert len(SHARED) + 1 >= 12 and {*SHARED, "sft"} <= LOSSES.keys()


@pytest.fixture(scope="module")
def reward_model() -> Any:
    """A random reward model."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    return LlamaForSequenceClassification(tiny_config(num_labels=1))


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward_loss(reward_model: Any, margin: bool, center: float, tmp_path: Path) -> None:
    """Bradley-Terry with and without margin and centre term."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    margins = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    data = Dataset.from_list(
        [{"chosen": user(q) + assistant(w), "rejected": user(q) + assistant(r)} | ({"margin": m} if margin else {})
         for q, w, r, m in zip(QUESTIONS, CHOSEN, REJECTED, margins, strict=True)]
    )  # fmt: skip
    trainer = RewardTrainer(
        reward_model, args=RewardConfig(**options(tmp_path), center_rewards_coefficient=center or None),
        train_dataset=data, processing_class=byte_tokenizer(),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(QUESTIONS))])
    loss = trainer.compute_loss(reward_model, dict(batch))
    loss.backward()
    expected = loss, gradients(reward_model)
    pairs = [(user(q), (w, r)) for q, w, r in zip(QUESTIONS, CHOSEN, REJECTED, strict=True)]
    trees, _, _ = answer_trees(byte_tokenizer(), pairs, DataConfig(max_length=128))
    scores = sequence_scores(reward_model, packed(trees)).view(-1, 2)
    own = reward_loss(scores, margin=torch.tensor(margins) * margin, center=center).mean()
    own.backward()
    assert_same((own, gradients(reward_model)), expected)


def test_sft_loss(models: tuple[Any, Any], tmp_path: Path) -> None:
    """Mean over all supervised tokens of the batch: the answer and its stop token."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": user(q), "completion": assistant(w)} for q, w in zip(QUESTIONS, CHOSEN, strict=True)]
    trainer = SFTTrainer(
        models[0], args=SFTConfig(**options(tmp_path)), train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(QUESTIONS))])
    loss = trainer.compute_loss(models[0], dict(batch))
    loss.backward()
    expected = loss, gradients(models[0])
    examples = [Example(id=str(i), messages=(*row["prompt"], *row["completion"])) for i, row in enumerate(rows)]
    loaded = conversation_trees(byte_tokenizer(), examples, DataConfig(max_length=128))
    tokens = packed(list(loaded.items))
    own = target_nll(models[0], tokens) / tokens.target.shape[0]
    own.backward()
    assert_same((own, gradients(models[0])), expected)
