"""A language model's service: one adapter a request, revoked bit for bit, checked by the commands for services."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from texts import PACKING, TINY, job, prepared

from postgrad.__main__ import main
from postgrad.core.layer_adapters import adapter_names, pairs
from postgrad.core.models import load_lm, save_model
from postgrad.errors import ArtefactError
from postgrad.forgetting.entries import ApplyBody, RevokeBody
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.network_service import Carried, NetworkService
from postgrad.forgetting.request import ForgetRequest, manifest_hash
from postgrad.forgetting.text_losses import TextObjectiveConfig
from postgrad.forgetting.text_service import (
    LIMITS,
    answers_to_noise,
    load_text_base,
    revoke_texts,
    rows_of,
    text_service,
)
from postgrad.forgetting.unlearn_steps import Place, prepare

SALT = "5a" * 16
METRICS = {"num_target_tokens": 9.0, "acc_f": 0.0, "acc_r": 99.0, "acc_r_pretrained": 100.0, "num_earlier": 0.0}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a base in model/ and two requests in service/."""
    model, tokenizer = load_lm(TINY, job(tmp_path))
    save_model(model, tokenizer, tmp_path / "model")
    base = load_text_base(str(tmp_path / "model"), job(tmp_path))
    with text_service(tmp_path / "service", base, str(tmp_path / "model")).open() as service:
        for number, name in enumerate(("first", "second")):
            apply(service, name, number, tmp_path)
    return tmp_path


def apply(service: NetworkService, name: str, number: int, folder: Path) -> None:
    """Carry out a request whose adapter is noise."""
    request = ForgetRequest(id=name, samples=(f"{number:016x}",), salt=SALT)
    earlier = service.active
    task = prepared(folder, TextObjectiveConfig())
    place = Place(service.network, f"request-{name}", tuple(f"request-{each}" for each in earlier), PACKING)
    service.show(earlier)
    again = prepare(place, task.trees, task.before, task.settings, number)
    for seed, (_, b) in enumerate(pairs(service.network, place.name).values()):
        torch.nn.init.normal_(b, std=0.1, generator=torch.Generator().manual_seed(10 * number + seed))
    service.write(request)
    carried = Carried(
        blocks=again.blocks, num_forget=1, num_retain=5, manifest_hash=manifest_hash(SALT, request.samples), config="",
        seed=0, hardware="cpu", metrics=METRICS, policy=LIMITS,
    )  # fmt: skip
    service.enter(request, carried)


def opened(made: Path, folder: str = "service") -> NetworkService:
    return text_service(made / folder, load_text_base(str(made / "model"), job(made)), "model").open()


def test_a_service_is_gone_on_with(made: Path) -> None:
    with opened(made) as service:
        assert service.active == ("first", "second") and service.findings() == []
        assert rows_of(service, service.active) == {"0" * 16: "first", f"{1:016x}": "second"}
        service.show([])
        bare = answers_to_noise(service.network)
        service.show(["first"])
        one = answers_to_noise(service.network)
        service.show(["first", "second"])
        assert not torch.equal(bare, one) and not torch.equal(one, answers_to_noise(service.network))
        service.show([])
        assert torch.equal(bare, answers_to_noise(service.network)) and adapter_names(service.network) == ()
    body = [entry.body for entry in Ledger(made / "service").entries()][1]
    assert isinstance(body, ApplyBody) and body.num_blocks == 2 and len(body.tensors) == 6
    page = (made / "service/certificates/first.html").read_text()
    assert "forget 1 single row." in page and "5 rows held the rest" in page and "image" not in page


def test_a_request_is_undone_bit_for_bit(made: Path) -> None:
    """Of two, the first: what is left answers as a model that has had the second alone."""
    with opened(made) as service:
        service.show(["second"])
        alone = answers_to_noise(service.network)
        assert service.undone("first") and service.active == ("first", "second")
        entry = revoke_texts(service, "first")
        assert isinstance(entry.body, RevokeBody) and entry.body.bit_exact and service.active == ("second",)
        assert torch.equal(alone, answers_to_noise(service.network)) and service.findings() == []
        with pytest.raises(ArtefactError, match="'first' is revoked, not in use"):
            revoke_texts(service, "first")
        service.show(["first", "second"])  # as it was, to verify


def test_another_base_is_refused(made: Path) -> None:
    """Neither the ledger nor an adapter goes with a model of other weights, whatever its shape."""
    other, _ = load_lm(TINY, replace(job(made), seed=1))
    with pytest.raises(ArtefactError, match=r"belongs to a base of hash .*the model at hand, other, has"):
        text_service(made / "service", other, "other").open()
    with text_service(made / "new", other, "other").open() as service:
        shutil.copytree(made / "service/adapters/first", made / "new/adapters/first")
        with pytest.raises(ArtefactError, match="no request 'first' was applied"):
            service.show(["first"])


def test_an_altered_adapter_is_refused(made: Path) -> None:
    path = made / "service/adapters/first/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    with pytest.raises(ArtefactError, match=r"adapter_config\.json: expected .*the SHA-256"):
        opened(made)


def test_what_has_no_entry_is_removed(made: Path) -> None:
    """A process stopped between writing an adapter and entering it has changed nothing; a lost page is made again."""
    shutil.copytree(made / "service/adapters/first", made / "service/adapters/third")
    page = made / "service/certificates/second.html"
    text = page.read_bytes()
    page.unlink()
    with opened(made) as service:
        assert service.active == ("first", "second") and not (made / "service/adapters/third").exists()
    assert page.read_bytes() == text


def command(made: Path, *words: str) -> int:
    folder = str(made / f"run-{words[0]}-{len(list(made.iterdir()))}")
    options = ["--service", str(made / "service"), "--model.path", str(made / "model")]
    return main([*words, *options, "--runtime.folder", folder, "--runtime.quiet", "--runtime.device", "cpu"])


def test_the_commands_for_services(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verify finds nothing, then what was altered; revoke undoes; bake says what to do instead."""
    assert command(made, "verify") == 0
    assert command(made, "revoke", "--requests", "second") == 0
    assert "Undone" in capsys.readouterr().out
    assert command(made, "verify") == 0
    assert command(made, "bake") == 2
    assert "merge_and_unload" in capsys.readouterr().err
    certificate = made / "service/certificates/first.json"
    table = json.loads(certificate.read_text())
    certificate.write_text(json.dumps({**table, "format": "mine"}))
    assert command(made, "verify") == 2
    shutil.rmtree(made / "model")
    model, tokenizer = load_lm(TINY, replace(job(made), seed=1))
    save_model(model, tokenizer, made / "model")
    assert command(made, "verify") == 2 and command(made, "revoke", "--requests", "first") == 2
