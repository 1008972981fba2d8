"""Load, probe and save pretrained language models, and run them on packed rows.

Letters: R rows, T tokens of a row, N target tokens, S sequences, D width.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as hf_logging

from postgrad.core import adapters, segments
from postgrad.core.config import DataConfig, ModelConfig
from postgrad.core.files import atomic_path, flush, remove
from postgrad.core.masks import attention_inputs
from postgrad.core.ops import Head, sum_by_sequence, token_logprobs, token_nll
from postgrad.core.precision import autocast
from postgrad.core.rows import CPU_MULTIPLE, GPU_MULTIPLE, Layout, Rows, Tree, pack
from postgrad.core.runtime import Job, stage_seed
from postgrad.core.text import byte_tokenizer, set_chat_template
from postgrad.errors import ModelError

TINY_POSITIONS = 512
"""Longest context of the built-in tiny model, in tokens."""
TINY_SPREAD = 0.1
"""Standard deviation of its first weights, near 1 / sqrt(width); at the usual 0.02, made for widths in the thousands,
attention starts uniform and a tiny model on noisy data learns nothing for a thousand steps."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with the chat template asked for and a padding token."""
    if config.path == "tiny":
        if config.lora_rank:
            raise ModelError("the tiny model is drawn anew from its seed, an adapter would have no base; lora_rank = 0")
        tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    else:
        folder = adapters.base_of_adapter(config.path) if _lacks_tokenizer(config.path) else config.path
        tokenizer = _explain(config.path, lambda: AutoTokenizer.from_pretrained(folder))
    if config.chat_template:
        set_chat_template(tokenizer, config.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_lm(config: ModelConfig, job: Job, *, frozen: bool = False) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a causal language model (hub name, folder, adapter folder or "tiny") and its tokenizer.

    Weights are float32 when they train and the run's dtype when frozen. With ``lora_rank`` only the adapter trains.
    """
    tokenizer = load_tokenizer(config)
    if config.path == "tiny":
        model = _tiny_llama(config, tokenizer, job.seed)
        model.set_attn_implementation(segments.NAME)
    else:
        model = _from_pretrained(AutoModelForCausalLM, config.path, job, frozen)
    _use_tokens(model, tokenizer)
    return _prepare(model, config, job, frozen, "CAUSAL_LM"), tokenizer


def load_reward_model(
    config: ModelConfig, job: Job, *, frozen: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a model with one scalar head (``score``); a causal model's folder gets a new head, drawn from the seed.

    The new head starts at standard deviation 1 / (D + 1) (Stiennon et al. 2020).
    """
    tokenizer = load_tokenizer(config)
    if config.path == "tiny":
        lm = _tiny_llama(config, tokenizer, job.seed)
        settings = LlamaConfig(**{**lm.config.to_dict(), "num_labels": 1})
        model = AutoModelForSequenceClassification.from_config(settings, attn_implementation=segments.NAME)
        model.model.load_state_dict(lm.model.state_dict())
        fresh = True
    else:
        model = _from_pretrained(AutoModelForSequenceClassification, config.path, job, frozen, num_labels=1)
        fresh = not _has_head(config.path)
    if "score" not in dict(model.named_children()):
        raise ModelError(f"{config.path}: a {type(model).__name__} has no `score` head; use a decoder-only model")
    if fresh:
        weight = model.score.weight
        noise = torch.Generator().manual_seed(stage_seed(job.seed, "score head"))
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=noise) / (weight.shape[1] + 1))
    _use_tokens(model, tokenizer)
    return _prepare(model, config, job, frozen, "SEQ_CLS"), tokenizer


def _prepare(model: Any, config: ModelConfig, job: Job, frozen: bool, task: Any) -> nn.Module:
    """Freeze, inject LoRA, set checkpointing and move to the device."""
    if frozen:
        model.requires_grad_(False).eval()
    else:
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if config.lora_rank:
            model = adapters.add_lora(model, config, task)
        model.train()
    placed: nn.Module = model.to(job.device)
    return placed


def _tiny_llama(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """Build a small Llama from scratch; its weights depend on the seed alone."""
    heads = max(1, config.tiny_width // 16)
    if config.tiny_width % heads or (config.tiny_width // heads) % 2:
        raise ModelError(f"model.tiny_width must be a multiple of 16, got {config.tiny_width}")
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.tiny_width, intermediate_size=config.tiny_width * 8 // 3,
        num_hidden_layers=config.tiny_layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=TINY_POSITIONS, tie_word_embeddings=True, bos_token_id=None,
        initializer_range=TINY_SPREAD,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_seed(seed, "tiny llama"))
        return LlamaForCausalLM(settings)


def _from_pretrained(kind: Any, path: str, job: Job, frozen: bool, num_labels: int = 0) -> Any:
    """Load a model folder with the attention that the device is best at; adapters are merged, one upon another."""
    if adapters.is_adapter(path):
        model = _from_pretrained(kind, adapters.base_of_adapter(path), job, frozen, num_labels)
        merged = adapters.merge_adapter(model, path)
        merged.name_or_path = path  # what an adapter trained on top will name as its base
        return merged
    dtype = job.dtype if frozen else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": segments.NAME}
    if num_labels:
        options["num_labels"] = num_labels
    with _hushed():
        return _explain(path, lambda: kind.from_pretrained(path, **options))


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep transformers from reporting that a new head is new."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def _explain(path: str, load: Callable[[], Any]) -> Any:
    """Call a transformers loader; say what to do when it fails."""
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load {path!r}: {first} Give a hub name you can reach or a folder with config.json, "
            f"model.safetensors and the tokenizer's files."
        ) from error


def _lacks_tokenizer(path: str) -> bool:
    return adapters.is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file()


def _has_head(path: str) -> bool:
    """Say whether a folder's weights hold a score head; a hub name is trusted to be a reward model."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return not Path(path).is_dir()
    keys: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as weights:
            keys += weights.keys()
    return any("score" in key for key in keys)


def _use_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the tokenizer's padding and stop tokens, so that saved folders work everywhere."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        if model.generation_config.eos_token_id is None:
            model.generation_config.eos_token_id = tokenizer.eos_token_id


def within_context(data: DataConfig, model: nn.Module) -> DataConfig:
    """Lower the longest length asked for to the context the model was built for."""
    settings = adapters.unwrap(model).config.get_text_config().to_dict()
    context = settings.get("max_position_embeddings") or settings.get("n_positions") or data.max_length
    return replace(data, max_length=min(data.max_length, int(context)))


def head_of(model: nn.Module) -> Head:
    """Find the output projection of a causal language model, with its bias, scale and soft cap."""
    base = adapters.unwrap(model)
    layer = base.get_output_embeddings()
    if not isinstance(layer, nn.Module):
        raise ModelError(f"{type(base).__name__} has no output embedding; a causal language model is needed")
    known = base.config.get_text_config().to_dict()
    scale = (known.get("logit_scale") or 1.0) / (known.get("logits_scaling") or 1.0)
    own = dict(layer.named_parameters(recurse=False))
    return Head(own["weight"], own.get("bias"), float(scale), float(known.get("final_logit_softcapping") or 0.0))


def hidden_states(model: nn.Module, rows: Rows) -> Float[Tensor, "RT D"]:
    """Run the backbone (no head) on packed rows and lay the rows end to end."""
    base = adapters.unwrap(model)
    backbone = base.base_model
    inputs = attention_inputs(base.config, rows)
    output = backbone(input_ids=rows.tokens, position_ids=rows.positions, use_cache=False, **inputs)
    states: Tensor = output.last_hidden_state
    return states.flatten(0, 1)  # [R*T, D]


def target_logprobs(model: nn.Module, rows: Rows) -> Float[Tensor, " N"]:
    """Return the log-probability of every target token, in nats."""
    return token_logprobs(hidden_states(model, rows)[rows.source], head_of(model), rows.target)


def target_nll(model: nn.Module, rows: Rows) -> Float[Tensor, ""]:
    """Return the summed negative log-likelihood of all target tokens, in nats; cheaper than -target_logprobs.sum()."""
    return token_nll(hidden_states(model, rows)[rows.source], head_of(model), rows.target)


def sequence_logprobs(model: nn.Module, rows: Rows) -> Float[Tensor, " S"]:
    """Return the summed log-probability of every sequence, in nats."""
    return sum_by_sequence(target_logprobs(model, rows), rows.sequence, rows.num_sequences)


def sequence_scores(model: nn.Module, rows: Rows) -> Float[Tensor, " S"]:
    """Return the reward of every sequence: the scalar head at its last token."""
    last = hidden_states(model, rows)[rows.ends]  # [S, D]
    scores: Tensor = adapters.unwrap(model).score(last)  # [S, 1]
    return scores[:, 0].float()


@torch.no_grad()
def choose_layout(config: ModelConfig, model: nn.Module, job: Job) -> Layout:
    """Take the layout asked for, or probe: "tree" if a shared prompt gives what separate rows give, else "flat".

    Raises: ModelError: "tree" was asked for and the model cannot take it.
    """
    if config.layout == "flat":
        return "flat"
    vocabulary = adapters.unwrap(model).get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    tree = Tree(tuple(tokens[:9]), (tuple(tokens[9:16]), tuple(tokens[16:])))
    found = {layout: _probe(model, tree, layout, job) for layout in ("tree", "flat")}
    tolerance = 0.05 if job.dtype == torch.bfloat16 else 1e-3
    if torch.allclose(found["tree"], found["flat"], rtol=tolerance, atol=tolerance):
        return "tree"
    if config.layout == "tree":
        raise ModelError(
            f"{type(adapters.unwrap(model)).__name__} does not honour tree masks (off by "
            f"{(found['tree'] - found['flat']).abs().max():.2g}); use --model.layout flat"
        )
    return "flat"


def _probe(model: nn.Module, tree: Tree, layout: Any, job: Job) -> Tensor:
    """Give what the backbone says of each answer's tokens, or NaN where it refuses the layout."""
    was_training = model.training
    model.eval()
    try:
        multiple = GPU_MULTIPLE if job.device.type == "cuda" else CPU_MULTIPLE
        rows = pack([tree], [0], row_length=0, layout=layout, pad_id=0, multiple=multiple).to(job.device)
        with autocast(job):
            return hidden_states(model, rows)[rows.source].float()
    except (TypeError, ValueError, RuntimeError):
        return torch.full((1,), math.nan, device=job.device)
    finally:
        model.train(was_training)


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a save_pretrained folder (an adapter folder for LoRA) with its tokenizer, atomically."""
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True, exist_ok=True)
        writable: Any = model
        if isinstance(model, PreTrainedModel):
            writable.save_pretrained(temporary)
        else:
            writable.save_pretrained(temporary, save_embedding_layers=False)  # adapters leave them as they are
        tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            flush(file)
        remove(folder)


def model_hash(model: nn.Module) -> str:
    """Hash names and bytes of all weights; 16 hex digits."""

    def one(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # hashing lets the other threads run
        parts = list(pool.map(one, sorted(model.state_dict().items())))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count all and trainable parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def planned_parameters(config: ModelConfig) -> tuple[int, int]:
    """Count all and trainable parameters from the model's config alone, without loading or drawing weights."""
    if config.path == "tiny":
        with torch.device("meta"):
            return count_parameters(_tiny_llama(config, byte_tokenizer(), 0))
    path = config.path
    while adapters.is_adapter(path):
        path = adapters.base_of_adapter(path)
    settings: PretrainedConfig = _explain(path, lambda: AutoConfig.from_pretrained(path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
        if config.lora_rank:
            model = adapters.add_lora(model, config)
    return count_parameters(model)


def training_memory_gib(total: int, trainable: int) -> float:
    """Estimate memory of weights, gradients and AdamW states in GiB, without activations: 4 bytes, 16 if trained."""
    return (4 * total + 12 * trainable) / 2**30
