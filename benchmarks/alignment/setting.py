"""What a run of one system is: task, data, model, batch; and what it measures."""

import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.alignment.data import MAX_LENGTH, PAD, STOP

LR = 1e-4
GIB = 2**30
SIZES = {  # width, inner width, layers, heads, key-value heads, tied embeddings
    "tiny": (32, 64, 2, 2, 1, False),
    "small": (256, 688, 4, 4, 4, False),
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1b": (2048, 8192, 16, 32, 8, True),
}


@dataclass(frozen=True)
class Setting:
    """One run of one system."""

    system: str
    """"postgrad", or the name of a peer's settings in `peer.PEERS`."""
    task: str
    """dpo, reward or sft."""
    data: str
    num: int
    """Rows, all of them seen once."""
    batch: int
    """Rows an optimizer step."""
    vocabulary: int
    size: str = "small"
    device: str = "cpu"
    seed: int = 0
    micro_tokens: int = 2048
    """postgrad: packed tokens a forward pass."""
    peer_batch: int = 0
    """Peer: rows a forward pass; 0 = as its settings say."""


@dataclass
class Measured:
    """What a run measured; seconds of the reference pass are part of the whole."""

    setting: dict[str, Any]
    tokens: int
    wall: float = 0.0
    cpu: float = 0.0
    reference_wall: float = 0.0
    reference_cpu: float = 0.0
    peak: float = 0.0
    """GiB of the process at most; on CUDA of the device."""
    base: float = 0.0
    """GiB before the model was made: interpreter, libraries, data."""
    losses: list[float] = field(default_factory=list)


class Meter:
    """Adds up wall and processor seconds of some stretches of a run, and keeps its peak memory."""

    def __init__(self, setting: Setting, tokens: int) -> None:
        self._cuda = setting.device == "cuda"
        self.found = Measured(asdict(setting), tokens, base=self._memory())
        self._mark = (0.0, 0.0)

    def start(self) -> None:
        """Begin a stretch."""
        self._wait()
        self._mark = (time.perf_counter(), time.process_time())

    def stop(self, *, reference: bool = False) -> None:
        """End a stretch."""
        self._wait()
        wall, cpu = time.perf_counter() - self._mark[0], time.process_time() - self._mark[1]
        self.found.wall += wall
        self.found.cpu += cpu
        if reference:
            self.found.reference_wall, self.found.reference_cpu = wall, cpu
        if self._cuda:
            self.found.peak = torch.cuda.max_memory_allocated() / GIB
        else:
            self.found.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    def _memory(self) -> float:
        """Give what is in use before the model is made, and begin to watch the peak."""
        if not self._cuda:
            return _resident()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / GIB

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / GIB


def make_model(setting: Setting, attention: str) -> torch.nn.Module:
    """Draw a Llama's weights from the seed; the same for every system."""
    width, inner, layers, heads, kv_heads, tied = SIZES[setting.size]
    config = LlamaConfig(
        vocab_size=setting.vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, pad_token_id=PAD,
        bos_token_id=None, eos_token_id=STOP, max_position_embeddings=2 * MAX_LENGTH, num_labels=1,
    )  # fmt: skip
    kind = LlamaForSequenceClassification if setting.task == "reward" else LlamaForCausalLM
    torch.manual_seed(setting.seed)
    with torch.device(setting.device):
        model = kind(config)
    model.set_attn_implementation(attention)
    return model
