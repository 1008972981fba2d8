"""A service of a language model: its base has no classes, its requests name rows by the hash of their content.

Ledger, adapters and certificates are those of `network_service`. A new base is not made here: merge an adapter with
peft where you want one.

Letters: R rows, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postgrad.core.adapters import unwrap
from postgrad.core.config import ModelConfig
from postgrad.core.models import hidden_states, load_lm
from postgrad.core.rows import Tree, pack
from postgrad.core.runtime import Job
from postgrad.forgetting.entries import Entry
from postgrad.forgetting.network_service import NetworkService
from postgrad.forgetting.policy import PolicyConfig

LIMITS = PolicyConfig(few_shot_min=0)
"""What a request should reach: those of classifiers, accuracy being the share of answers recited; few rows will do."""
NOISE_ROWS, NOISE_TOKENS = 4, 24


def text_service(folder: Path, model: nn.Module, base_name: str) -> NetworkService:
    """Make the service of a language model; `open` begins it or goes on with it."""
    return NetworkService(folder, model, (), base_name, answers_to_noise)


def load_text_base(path: str, job: Job) -> nn.Module:
    """Load the base of a language model's service, as `postgrad unlearn` does."""
    base: nn.Module = unwrap(load_lm(ModelConfig(path=path), job, frozen=True)[0])
    return base


def rows_of(service: NetworkService, requests: Sequence[str]) -> dict[str, str]:
    """Give the ids of the rows that requests have forgotten -> the request."""
    return {sample: name for name in requests for sample in service.request(name).samples}


def revoke_texts(service: NetworkService, request: str) -> Entry:
    """Take a request out of use; nothing is measured, since no row is at hand."""

    def none() -> Mapping[str, float]:
        return {}

    return service.revoke(request, none)


@torch.no_grad()
def answers_to_noise(model: nn.Module) -> Float[Tensor, "RT D"]:
    """Compute what the output layer reads for rows of noise, always the same ones."""
    model.eval()
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    noise = torch.Generator().manual_seed(0)
    drawn = torch.randint(embedding.num_embeddings, (NOISE_ROWS, NOISE_TOKENS), generator=noise)
    trees = [Tree(tuple(row), (), (True,) * NOISE_TOKENS) for row in drawn.tolist()]
    rows = pack(trees, range(NOISE_ROWS), row_length=0, layout="flat", pad_id=0)
    return hidden_states(model, rows.to(embedding.weight.device))
