"""Random trees and tiny models, and what a model says of a tree without any packing."""

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from postgrad.core.rows import Tree
from postgrad.core.runtime import Job

VOCABULARY = 61


def job(rank: int = 0, world: int = 1, seed: int = 0) -> Job:
    return Job("sft", Path("unused"), seed, torch.device("cpu"), torch.float32, rank, world, True)


def tiny(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128)
        ).eval()
    if kind == "sliding":
        return Qwen3ForCausalLM(
            Qwen3Config(**shape, num_key_value_heads=1, head_dim=16, sliding_window=5, use_sliding_window=True,
                        layer_types=["full_attention", "sliding_attention"])
        ).eval()  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1)).eval()


def random_trees(num: int, seed: int = 0) -> list[Tree]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(VOCABULARY, (size,), generator=generator).tolist())

    trees = []
    for i in range(num):
        if i % 3 == 2:
            prompt = tokens(4, 14)
            trees.append(Tree(prompt, (), tuple(k % 2 == 0 for k in range(len(prompt)))))
        else:
            trees.append(Tree(tokens(1, 9), tuple(tokens(1, 8) for _ in range(1 + i % 4))))
    return trees


def one_by_one(model: torch.nn.Module, tree: Tree) -> torch.Tensor:
    """Log-probability of each sequence through the model's own logits, no packing, no mask of ours."""
    sums = []
    for answer in tree.answers or ((),):
        ids = torch.tensor([tree.prompt + answer])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        if tree.answers:
            sums.append(logprobs[len(tree.prompt) - 1 :].sum())
        else:
            sums.append(logprobs[torch.tensor(tree.supervised[1:])].sum())
    return torch.stack(sums)
