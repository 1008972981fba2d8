"""The service: whatever stops it, the folder is as before a change or as after it, and the base is never touched."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forget_runs import Killed
from forgotten import CONFIGS, QUICK, Made, carry_out, forgotten, images, job, load, measured, request

from postgrad.core.layer_adapters import adapter_names
from postgrad.core.vision_models import Classifier, classifier_hash
from postgrad.errors import ArtefactError, DataError, GateError
from postgrad.forgetting import service as module
from postgrad.forgetting import service_parts
from postgrad.forgetting.entries import ApplyBody, RevokeBody, digest
from postgrad.forgetting.ledger import Ledger, current_base
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_parts import adapter_name, answers
from postgrad.forgetting.signature import make_key
from postgrad.forgetting.verification import hash_files, verify_service


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return forgotten(tmp_path / "given")


@pytest.fixture
def service(made: Made) -> Service:
    return Service.open(made.service, load(made.model), "base")


def die(*_: object, **__: object) -> None:
    raise Killed


def contents(folder: Path) -> dict[str, str]:
    """Hash what a service consists of; copies of the base's record are no part of it."""
    return {name: value for name, value in hash_files(folder).items() if name != ".lock" and "bases/" not in name}


def logits(classifier: Classifier) -> torch.Tensor:
    return answers(classifier, images()[1])


def sound(made: Made, model: Path | None = None) -> bool:
    return verify_service(made.service, tensors=classifier_hash(load(model or made.model))) == []


def test_a_request_is_applied_beside_those_before(service: Service, made: Made, tmp_path: Path) -> None:
    before = classifier_hash(service.classifier)
    entry = carry_out(service, request("third", "7"), load(made.model), tmp_path / "run")
    assert service.active == ("first", "second", "third") == service.forgotten
    assert service.earlier(["third"]) == ("first", "second")
    assert isinstance(entry.body, ApplyBody) and entry.body.metrics["num_earlier"] == 2
    assert entry.body.metrics["acc_f"] < entry.body.metrics["acc_f_pretrained"] / 2
    assert classifier_hash(service.classifier) == before and sound(made)
    now = logits(service.classifier)
    again = Service.open(made.service, load(made.model), "base")
    assert torch.equal(logits(again.classifier), now)
    assert service.in_use_at(entry) == service.active
    split = service.split_at(entry)
    assert (split.forget, split.old) == ((7,), (0, 4, 6)) and split.remain == (1, 2, 3, 5, 8, 9)


def test_a_service_begins_with_its_base(made: Made, tmp_path: Path) -> None:
    with Service.open(tmp_path / "new", load(made.model), "my base") as service:
        (entry,) = service.ledger.entries()
        assert entry.kind == "base" and service.active == ()
        assert torch.equal(logits(service.classifier), logits(load(made.model)))
    assert verify_service(tmp_path / "new") == []


def test_the_base_hash_never_changes(service: Service, made: Made, tmp_path: Path) -> None:
    expected = digest(classifier_hash(load(made.model)))
    carry_out(service, request("third", "7"), load(made.model), tmp_path / "run")
    service.revoke("first", images()[1])
    bodies = [vars(entry.body) for entry in service.ledger.entries()]
    assert {body["base_hash"] for body in bodies} == {expected}


@pytest.mark.parametrize(("gone", "left"), [("first", "second"), ("second", "first")])
def test_a_revocation_gives_the_outputs_of_a_model_that_never_had_it(
    service: Service, made: Made, gone: str, left: str
) -> None:
    entry = service.revoke(gone, images()[1])
    never = Service.read(made.service, load(made.model), "base")
    never.show([left])
    assert torch.equal(logits(service.classifier), logits(never.classifier))
    assert isinstance(entry.body, RevokeBody) and entry.body.bit_exact
    found = entry.body.metrics
    assert found["acc_back"] > 50 > found["acc_o"] and {"acc_r", "acc_r_low", "acc_back_high"} <= found.keys()
    assert service.active == (left,) and sound(made)
    service.revoke(left, images()[1])
    assert torch.equal(logits(service.classifier), logits(load(made.model)))
    assert adapter_names(service.classifier.network) == ()


def test_a_trace_left_by_a_revocation_is_entered(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(range(2))
    exact = module.answers
    monkeypatch.setattr(module, "answers", lambda *given: exact(*given) + 1e-7 * next(drawn))
    entry = service.revoke("first", images()[1])
    assert isinstance(entry.body, RevokeBody) and not entry.body.bit_exact


def test_revoked_requests_can_be_shown(service: Service, made: Made) -> None:
    both = logits(service.classifier)
    service.revoke("first", images()[1])
    service.show(["first", "second"])
    assert torch.equal(logits(service.classifier), both)
    service.show(service.active)
    assert not torch.equal(logits(service.classifier), both)


def test_only_what_is_in_use_is_revoked(service: Service) -> None:
    service.revoke("first", images()[1])
    for name, state in (("first", "revoked"), ("frist", "unknown")):
        with pytest.raises(ArtefactError, match=f"'{name}' is {state}, not in use; in use are \\['second'\\]"):
            service.revoke(name, images()[1])


@pytest.mark.parametrize("before", [True, False], ids=["before the entry", "after the entry"])
def test_a_process_killed_while_applying_leaves_before_or_after(
    service: Service, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    old, was = contents(made.service), logits(service.classifier)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if before:
            patch.setattr(Ledger, "append", die)
        else:
            patch.setattr(service_parts, "write_certificate", die)
        carry_out(service, request("third", "7"), load(made.model), tmp_path / "run")
    assert (made.service / "adapters/third").is_dir()
    (made.service / "adapters/.fourth.123.tmp").mkdir()
    (made.service / "certificates/.third.json.123.tmp").touch()
    again = Service.open(made.service, load(made.model), "base")
    assert sound(made)
    if before:
        assert contents(made.service) == old and torch.equal(logits(again.classifier), was)
        carry_out(again, request("third", "7"), load(made.model), tmp_path / "run")
    assert again.active == ("first", "second", "third")
    straight = forgotten(tmp_path / "straight")
    with Service.open(straight.service, load(straight.model), "base") as other:
        carry_out(other, request("third", "7"), load(made.model), tmp_path / "run of the other")
    assert hash_files(straight.service / "adapters") == hash_files(made.service / "adapters")


@pytest.mark.parametrize("error", [DataError("no figures"), OSError("disk full"), GateError("floor")])
def test_a_failed_call_leaves_the_service_as_it_was(
    service: Service, made: Made, tmp_path: Path, error: Exception
) -> None:
    old, was = contents(made.service), logits(service.classifier)

    def fail() -> dict[str, float]:
        raise error

    material = service.material(request("third", "7"), images()[0])
    with pytest.raises(type(error)):
        service.apply(request("third", "7"), material, CONFIGS, job(tmp_path / "run"), fail)
    assert contents(made.service) == old and torch.equal(logits(service.classifier), was)
    assert service.active == ("first", "second")


def test_a_request_above_its_floor_is_refused(service: Service, made: Made, tmp_path: Path) -> None:
    was = logits(service.classifier)
    material = service.material(request("third", "7"), images()[0])
    configs = (replace(QUICK, floor=-100.0), CONFIGS[1])
    with pytest.raises(GateError, match="floor"):
        service.apply(request("third", "7"), material, configs, job(tmp_path / "run"), dict)
    assert torch.equal(logits(service.classifier), was) and sound(made)
    assert adapter_name("third") not in adapter_names(service.classifier.network)


def test_a_revocation_that_is_not_entered_did_not_happen(
    service: Service, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = logits(service.classifier)

    def full(*_: object) -> None:
        raise ArtefactError("no room")

    with monkeypatch.context() as patch, pytest.raises(ArtefactError, match="no room"):
        patch.setattr(Ledger, "append", full)
        service.revoke("first", images()[1])
    assert service.active == ("first", "second") and torch.equal(logits(service.classifier), was)
    service.revoke("first", images()[1])


def test_a_request_is_not_applied_twice(service: Service, made: Made, tmp_path: Path) -> None:
    adapters = hash_files(made.service / "adapters")
    material = service.material(request("third", "7"), images()[0])
    for state in ("frozen", "revoked"):
        with pytest.raises(ArtefactError, match=f"'first' was applied before and is {state}"):
            service.apply(request("first", "7"), material, CONFIGS, job(tmp_path / "run"), dict)
        assert hash_files(made.service / "adapters") == adapters
        if state == "frozen":
            service.revoke("first", images()[1])


def test_the_same_request_is_told_from_another_of_its_id(service: Service) -> None:
    assert service.carried_out(request("third", "7")) is None
    known = service.carried_out(replace(request("first", "0", "6"), salt="11" * 16))
    assert known is not None and known == service.applied("first")
    with pytest.raises(ArtefactError, match="with other content"):
        service.carried_out(request("first", "0"))


def test_requests_that_cannot_be_found_are_refused(service: Service) -> None:
    with pytest.raises(DataError, match="class '4' was asked for by request 'second' already"):
        service.material(request("third", "4", "7"), images()[0])
    with pytest.raises(DataError, match="no class 'seven'"):
        service.material(request("third", "seven"), images()[0])
    sample = replace(request("third"), samples=("0" * 16,))
    with pytest.raises(DataError, match="no image with hash"):
        service.material(sample, images()[0])


def test_material_leaves_out_what_was_forgotten_and_what_is_missing(service: Service) -> None:
    material = service.material(replace(request("third", "7"), shots=3), images()[0], missing=(9,))
    assert set(material.forget.labels.tolist()) == {7} and len(material.forget) == 3
    assert set(material.retain.labels.tolist()) == {1, 2, 3, 5, 8} and material.task == 2


def test_another_base_is_refused(made: Made, tmp_path: Path) -> None:
    other = load(made.model)
    with torch.no_grad():
        next(other.network.parameters()).add_(1e-6)
    old = contents(made.service)
    with pytest.raises(ArtefactError, match=r"belongs to a base of hash \w{16}, base; the model at hand, x, has"):
        Service.open(made.service, other, "x")
    assert contents(made.service) == old


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "request.json"])
def test_an_altered_adapter_is_found_and_not_loaded(made: Made, file: str) -> None:
    path = made.service / "adapters/second" / file
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))
    found = {(finding.place, finding.field) for finding in verify_service(made.service)}
    assert ("adapters/second", file) in found
    with pytest.raises(ArtefactError, match=f"second/{file}: expected .* Restore it"):
        Service.open(made.service, load(made.model), "base")
    shutil.rmtree(path.parent)
    with pytest.raises(ArtefactError, match="found no file"):
        Service.open(made.service, load(made.model), "base")


def test_an_adapter_of_an_unknown_request_is_not_loaded(service: Service) -> None:
    with pytest.raises(ArtefactError, match="no request 'x' was applied"):
        service.show(["x"])


def test_the_same_classifier_may_be_opened_again(service: Service, made: Made) -> None:
    was = logits(service.classifier)
    again = Service.open(made.service, service.classifier, "base")
    assert torch.equal(logits(again.classifier), was)


def test_a_service_that_missed_an_entry_must_be_opened_again(service: Service, made: Made, tmp_path: Path) -> None:
    Service.open(made.service, load(made.model), "base").revoke("second", images()[1])
    calls: list[Callable[[], object]] = [
        lambda: service.revoke("first", images()[1]),
        lambda: service.bake(tmp_path / "baked", load),
        lambda: service.purge("first", []),
        lambda: carry_out(service, request("third", "7"), load(made.model), tmp_path / "run"),
        lambda: Service.read(made.service, load(made.model), "base").revoke("first", images()[1]),
    ]
    for call in calls:
        with pytest.raises(ArtefactError, match="Open it again"):
            call()


HOLDER = """
import sys
from pathlib import Path
from postgrad.forgetting.service_lock import hold
let_go = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


def test_two_processes_do_not_work_on_one_service(made: Made) -> None:
    command = [sys.executable, "-c", HOLDER, str(made.service)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtefactError, match=f"in use by process {holder.pid} on "):
            Service.open(made.service, load(made.model), "base")
        holder.stdin.write("\n")
    Service.open(made.service, load(made.model), "base").close()


def test_what_is_entered_is_signed_when_there_is_a_key(
    service: Service, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    public = make_key(tmp_path / "key.pem")
    monkeypatch.setenv("POSTGRAD_SIGNING_KEY", str(tmp_path / "key.pem"))
    carry_out(service, request("third", "7"), load(made.model), tmp_path / "run")
    unsigned = {"certificates/first.json", "certificates/second.json"}
    assert {finding.place for finding in verify_service(made.service, public_key=public)} == unsigned
    service.revoke("third", images()[1])
    assert {finding.place for finding in verify_service(made.service, public_key=public)} == unsigned


def test_figures_of_the_entries_come_out_again(service: Service, made: Made) -> None:
    entry = service.applied("second")
    assert entry is not None and isinstance(entry.body, ApplyBody)
    reader = Service.read(made.service, load(made.model), "base")
    reader.show(["first", "second"])
    found = measured(reader, request("second", "4"), load(made.model))
    assert found["acc_f"] == entry.body.metrics["acc_f"]
    assert current_base(service.ledger.entries()).base_hash == entry.body.base_hash
