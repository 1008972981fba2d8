"""Part "reduction": what is left of a mean gradient after FP8 sums over N ranks, and what they put on the wire.

Ranks are simulated in one process, to the bit; real processes over gloo then count what is handed to collectives.
"ring" is a plain FP8 ring: every rank's codes with one shared scale times mu, added from rank to rank with a rounding
at each hop, each share beginning at another rank. "native" is ours with the paper's automatic mu, after some steps.
"""

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fp8.lab import Lab, Numbers
from postgrad.fp8.collectives import chain_sum
from postgrad.fp8.numerics import E4M3, Quantized, dequantize, quantize, scale_for
from postgrad.fp8.reduction import amaxes_of, simulate_all_reduce
from postgrad.fp8.scaling_factor import ScalingFactor, saturated_share

PART = "reduction"
WORLDS, REAL = (2, 4, 8, 64), (2, 4)
SIGMAS = {"Gaussian": 0.0, "lognormal": 1.0}
AMAX_BYTES = 8
"""Of a tensor: its greatest magnitude before and after the sum."""
STEPS = 8
"""What an automatic mu is given to find its place."""
REPOSITORY = Path(__file__).resolve().parents[2]


def fp8_bytes(world: int, num: int) -> float:
    """Return the bytes a rank sends a parameter: a byte there and a byte back, and two magnitudes a tensor."""
    return 2 * (world - 1) / world + AMAX_BYTES / num


def ring_bytes(world: int, size: int) -> float:
    """Return the bytes a rank of an ordinary ring sends a parameter."""
    return 2 * size * (world - 1) / world


def draws(world: int, sigma: float, num: int, seed: int, device: torch.device) -> list[Tensor]:
    """Draw Gaussian gradients of each rank, times magnitudes that the ranks share."""
    noise = torch.Generator(device).manual_seed(seed)
    spread = torch.exp(sigma * torch.randn(num, generator=noise, device=device))
    return [torch.randn(num, generator=noise, device=device) * spread for _ in range(world)]


def snr(exact: Tensor, found: Tensor) -> float:
    """Return the signal-to-noise ratio in dB."""
    noise = (exact.double() - found.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def ring(ranks: Sequence[Tensor], mu: float) -> tuple[Tensor, float]:
    """Return the mean that an FP8 ring gives, and the share of elements at FP8's largest."""
    world, num = len(ranks), ranks[0].numel()
    scale = scale_for(amaxes_of(ranks).max(), E4M3) * mu
    codes = [quantize(x, E4M3, scale).codes for x in ranks]
    pieces = [slice(num * i // world, num * (i + 1) // world) for i in range(world)]
    summed = [
        chain_sum([codes[(i + 1 + hop) % world][piece] for hop in range(world)]) for i, piece in enumerate(pieces)
    ]
    total = torch.cat([piece.view(torch.uint8) for piece in summed]).view(E4M3.dtype)
    return dequantize(Quantized(total, scale * world, E4M3)), float(saturated_share(total))


def bf16_ring(ranks: Sequence[Tensor]) -> Tensor:
    """Return the mean that a BF16 ring gives, every hop rounded."""
    total = ranks[0].bfloat16()
    for x in ranks[1:]:
        total = total + x.bfloat16()
    return total.float() / len(ranks)


def native(world: int, sigma: float, num: int, device: torch.device) -> tuple[float, float]:
    """Return the SNR with the automatic mu after its first steps from 1, and mu there."""
    factor = ScalingFactor(1, device=device)
    for seed in range(STEPS):
        ranks = draws(world, sigma, num, seed, device)
        mu = float(factor.factors([0])[0])
        found = simulate_all_reduce([[x] for x in ranks], mode="native", factor=factor)[0]
    return snr(torch.stack(ranks).double().mean(0), dequantize(found)), mu


def quality(world: int, sigma: float, num: int, device: torch.device) -> Numbers:
    """Measure one number of ranks on one kind of tensor."""
    ranks = draws(world, sigma, num, STEPS - 1, device)
    exact = torch.stack(ranks).double().mean(0)
    own = simulate_all_reduce([[x] for x in ranks])[0]
    auto, mu = native(world, sigma, num, device)
    rings = {name: ring(ranks, value) for name, value in _factors(world).items()}
    return {
        "a2a dB": snr(exact, dequantize(own)), "native dB": auto, "its mu": mu,
        **{f"ring, mu {name} dB": snr(exact, found) for name, (found, _) in rings.items()},
        "ring, mu 1, saturated %": 100 * rings["1"][1], "BF16 ring dB": snr(exact, bf16_ring(ranks)),
        "FP8 B": fp8_bytes(world, num), "BF16 B": ring_bytes(world, 2), "float32 B": ring_bytes(world, 4),
    }  # fmt: skip


def _factors(world: int) -> dict[str, float]:
    """Return the fixed factors people use."""
    return {"1": 1.0, "1/sqrt N": 1 / math.sqrt(world), "1/N": 1 / world}


def counted(world: int, num: int) -> Numbers:
    """Start real processes over gloo, and compare what they hand to collectives with the formula."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        processes = [_start(rank, world, port, num, Path(folder)) for rank in range(world)]
        for process in processes:
            _, errors = process.communicate(timeout=180)
            if process.returncode:
                raise RuntimeError(errors.strip().splitlines()[-1])
        found = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world)]
    if len({one["codes"] for one in found}) > 1:
        raise RuntimeError("ranks disagree on the mean")
    return {
        "FP8 B": fp8_bytes(world, num), "BF16 B": ring_bytes(world, 2), "float32 B": ring_bytes(world, 4),
        "a2a B, counted": max(one["a2a"] for one in found) / num,
        "native B, counted": max(one["native"] for one in found) / num,
        "a2a B, wire": max(one["wire"] for one in found) / num, "a2a dB": found[0]["snr"],
    }  # fmt: skip


def _start(rank: int, world: int, port: int, num: int, folder: Path) -> "subprocess.Popen[str]":
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    environment = {**os.environ, "MASTER_ADDR": "localhost", **{key: str(value) for key, value in ranks.items()}}
    paths = [str(REPOSITORY), str(REPOSITORY / "src"), *(path for path in sys.path if path)]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.fp8.ranks", str(num), str(folder)]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def run(lab: Lab) -> None:
    """Simulate all numbers of ranks, then count bytes of real ones."""
    num = 2**14 if lab.quick else 2**20 if lab.cuda else 2**18
    for name, sigma in SIGMAS.items():
        for world in WORLDS:
            lab.measure(PART, name, f"{world} ranks, simulated", lambda: quality(world, sigma, num, lab.device))  # noqa: B023
    for world in REAL[:1] if lab.quick else REAL:
        lab.measure(PART, "Gaussian", f"{world} ranks, gloo", lambda: counted(world, num))  # noqa: B023
