"""A small service folder, as a run of the forgetting service leaves it, made without a model."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from torch import Tensor

from postgrad.forgetting.certificate import write_certificate
from postgrad.forgetting.entries import (
    ApplyBody,
    BakeBody,
    BaseBody,
    Entry,
    PurgeBody,
    RevokeBody,
    VerifyBody,
    digest,
)
from postgrad.forgetting.ledger import BaseState, Ledger, write_base
from postgrad.forgetting.policy import PolicyConfig, policy_limits
from postgrad.forgetting.request import ForgetRequest, class_prints, manifest_hash, request_hash, write_request
from postgrad.forgetting.verification import hash_files

SALT = "5a" * 16
NUM_BLOCKS = 4
CLASSES = tuple("0123456789")
NAME = "digits-vit"
PARTS = ("layernorm_before.weight", "attention.q.weight", "mlp.fc1.weight", "mlp.fc2.weight")
TENSORS = {
    name: hashlib.sha256(name.encode()).hexdigest()
    for name in (
        "vit.embeddings.cls_token",
        "vit.embeddings.patch.weight",
        *(f"vit.layers.{block}.{part}" for block in range(NUM_BLOCKS) for part in PARTS),
        "vit.layernorm.weight",
        "classifier.weight",
    )
}
METRICS = {
    "acc_f": 0.0,
    "acc_f_low": 0.0,
    "acc_f_high": 2.1,
    "acc_f_pretrained": 97.25,
    "acc_r": 96.5,
    "acc_r_low": 94.75,
    "acc_r_high": 97.75,
    "acc_r_pretrained": 97.5,
    "mia_auc": 0.5234,
    "knn_excess": 18.4,
    "knn_excess_low": 12.1,
    "knn_excess_high": 24.7,
    "num_earlier": 0.0,
    "min_shots": 142.0,
    "h": 97.0,
}
SAMPLE_METRICS = {
    "acc_f": 91.7, "acc_f_low": 74.2, "acc_f_high": 97.7, "acc_f_pretrained": 100.0, "acc_f_gold": 87.5,
    "acc_h": 90.0, "acc_h_low": 81.0, "acc_h_high": 95.0, "acc_h_pretrained": 92.0,
    "acc_r": 96.5, "acc_r_low": 94.75, "acc_r_high": 97.75, "acc_r_pretrained": 97.5,
    "acc_excess": 4.2, "acc_excess_low": -7.0, "acc_excess_high": 15.0,
    "mia_auc": 0.55, "mia_auc_low": 0.41, "mia_auc_high": 0.69, "mia_pretrained": 0.71, "mia_gold": 0.5,
    "mia_excess": 0.05, "mia_excess_low": -0.1, "mia_excess_high": 0.2,
    "num_earlier": 1.0, "num_old_classes": 0.0, "num_single_images": 24.0, "min_shots": 12.0,
}  # fmt: skip


@dataclass(frozen=True)
class Images:
    """As much of an image set as a request asks for."""

    labels: Tensor
    classes: tuple[str, ...]
    hashes: tuple[str, ...]


def images(labels: list[int], classes: str) -> Images:
    """Make images with hashes that count up."""
    return Images(torch.tensor(labels), tuple(classes), tuple(f"{i:016x}" for i in range(len(labels))))


def tick() -> Callable[[], datetime]:
    """Make a clock that goes a minute further each time it is read."""
    moments = [datetime(2026, 5, 12, 9, 13, tzinfo=UTC)]

    def clock() -> datetime:
        moments[0] += timedelta(minutes=1)
        return moments[0]

    return clock


def request(name: str, *classes: str, deadline: str = "2026-06-01") -> ForgetRequest:
    """Make a request."""
    return ForgetRequest(
        id=name,
        classes=classes,
        legal_basis="GDPR Art. 17(1)(b)",
        reason="consent withdrawn",
        deadline=deadline,
        requester_hash=digest("somebody"),
        salt=SALT,
    )


def base_entry(base: BaseState) -> BaseBody:
    """Make the body of the first entry."""
    return BaseBody(
        name=NAME,
        base_hash=base.base_hash,
        record_hash=base.record_hash,
        num_tensors=len(TENSORS),
        num_classes=len(CLASSES),
        code_version="1.0",
    )


def apply_entry(asked: ForgetRequest, base_hash: str, files: dict[str, str], *blocks: int) -> ApplyBody:
    """Make the body of an applied request that changed some blocks."""
    changed = tuple(f"vit.layers.{block}.mlp.{part}.weight" for block in blocks for part in ("fc1", "fc2"))
    kept = {name: value for name, value in TENSORS.items() if name not in changed}
    return ApplyBody(
        request=asked.id,
        request_hash=request_hash(asked),
        class_prints=class_prints(asked),
        num_samples=len(asked.samples),
        num_forget=284,
        num_retain=1153,
        manifest_hash=manifest_hash(SALT, [f"{number:016x}" for number in range(284)]),
        config_hash=digest("config"),
        code_version="1.0",
        seed=0,
        hardware="cpu, 1 thread",
        base_name=NAME,
        base_hash=base_hash,
        num_blocks=NUM_BLOCKS,
        blocks=tuple(f"vit.layers.{block}" for block in blocks),
        tensors=changed,
        num_identical=len(kept),
        identical_hash=digest(kept),
        adapter_files=files,
        metrics=METRICS,
        policy=policy_limits(PolicyConfig()),
    )


def identical(body: ApplyBody) -> dict[str, str]:
    """List the tensors that a request left alone."""
    return {name: value for name, value in TENSORS.items() if name not in body.tensors}


def carry_out(ledger: Ledger, asked: ForgetRequest, base_hash: str, *blocks: int, named: bool = True) -> Entry:
    """Write what an applied request leaves: adapter, entry, certificate."""
    folder = ledger.folder / "adapters" / asked.id
    folder.mkdir(parents=True)
    write_request(folder / "request.json", asked)
    (folder / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 1}\n')
    (folder / "adapter_model.safetensors").write_bytes(hashlib.sha512(asked.id.encode()).digest() * 20)
    body = apply_entry(asked, base_hash, hash_files(folder), *blocks)
    if asked.samples:
        body = replace(body, num_forget=len(asked.samples), metrics=SAMPLE_METRICS)
    elif asked.id != "2041":
        body = replace(body, metrics={**METRICS, "num_earlier": 1.0, "acc_o": 0.5})
    entry = ledger.append(body)
    write_certificate(ledger.folder, entry, asked, identical(body), named=named)
    return entry


def make_service(folder: Path) -> Ledger:
    """Make a service: two requests, the first one revoked, all of it verified."""
    base = write_base(folder, NAME, TENSORS, CLASSES)
    ledger = Ledger.open(folder, tick())
    ledger.append(base_entry(base))
    first = carry_out(ledger, request("2041", "8", "9"), base.base_hash, 1, 3)
    carry_out(ledger, request("2042", "7"), base.base_hash, 3, named=False)
    ledger.append(revoke_entry("2041", base.base_hash))
    assert isinstance(first.body, ApplyBody)
    ledger.append(PurgeBody(request="2041", manifest_hash=first.body.manifest_hash, num_files=3, code_version="1.0"))
    ledger.append(VerifyBody(base_hash=base.base_hash, num_requests=2, num_findings=0, metrics={}, code_version="1.0"))
    return ledger


def make_single(folder: Path) -> Ledger:
    """Make a service with a request for single images."""
    base = write_base(folder, NAME, TENSORS, CLASSES)
    ledger = Ledger.open(folder, tick())
    ledger.append(base_entry(base))
    samples = tuple(f"{number:016x}" for number in range(24))
    carry_out(ledger, replace(request("2043"), samples=samples), base.base_hash, 3, named=False)
    return ledger


def revoke_entry(name: str, base_hash: str) -> RevokeBody:
    """Make the body of a revocation."""
    return RevokeBody(request=name, base_hash=base_hash, bit_exact=True, metrics={"acc_o": 0.5}, code_version="1.0")


def bake_entry(base_hash: str, *names: str) -> BakeBody:
    """Make the body of a bake into another base."""
    return BakeBody(
        requests=names,
        base_hash=base_hash,
        new_base_hash=digest("baked"),
        record_hash=digest("record"),
        num_tensors=len(TENSORS),
        metrics={},
        code_version="1.0",
    )
