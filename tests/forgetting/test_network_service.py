"""A service of any network: what it enters, shows, mends and refuses; detectors use it in test_forget_boxes.py."""

import pytest
import torch
from networks import inputs, network, outputs

from postgrad.core.layer_adapters import base_hashes, inject, pairs
from postgrad.errors import ArtefactError
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.entries import RevokeBody
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.network_service import Carried, NetworkService
from postgrad.forgetting.policy import PolicyConfig
from postgrad.forgetting.request import ForgetRequest
from postgrad.forgetting.service_parts import adapter_name
from postgrad.forgetting.verification import verify_service

CLASSES = ("a", "b", "c", "d", "e")


def answers(made):
    with torch.no_grad():
        return outputs(made, inputs("vit"))


def service(folder, seed=0):
    made = network("vit", seed)
    return NetworkService(folder, made, CLASSES, "base", answers).open()


def request(name, *classes):
    return ForgetRequest(id=name, classes=classes, salt="5a" * 16)


def carry_out(made, asked):
    """Add an adapter that changes something, as training would."""
    blocks, name = ffn_blocks(made.network), adapter_name(asked.id)
    inject(made.network, name, list(blocks[0].linears), rank=2, alpha=2)
    with torch.no_grad():
        for _, b in pairs(made.network, name).values():
            b.fill_(0.05)
    made.write(asked)
    carried = Carried(
        blocks=blocks, num_forget=3, num_retain=9, manifest_hash="0" * 64, config="", seed=1, hardware="cpu",
        metrics={"ap_f": 0.5, "ap_r": 60.0, "ap_r_pretrained": 61.0, "num_earlier": 0.0, "min_shots": 3.0},
        policy=PolicyConfig(),
    )  # fmt: skip
    return made.enter(asked, carried)


def test_requests_are_entered_shown_and_revoked_bit_for_bit(tmp_path):
    with service(tmp_path) as made:
        hashes, before = base_hashes(made.network), answers(made.network)
        carry_out(made, request("one", "a"))
        first = answers(made.network)
        carry_out(made, request("two", "c"))
        assert made.active == ("one", "two") and made.labels(made.active) == (0, 2)
        assert not torch.equal(first, before) and base_hashes(made.network) == hashes
        entry = made.revoke("two", lambda: {"ap_back": 1.0})
        assert isinstance(entry.body, RevokeBody) and entry.body.bit_exact and entry.body.metrics == {"ap_back": 1.0}
        assert torch.equal(answers(made.network), first)
        made.show(("one", "two"))
        assert not torch.equal(answers(made.network), first), "revoked ones can be shown"
        made.show(())
        assert torch.equal(answers(made.network), before)
        assert made.findings() == []
    with service(tmp_path) as again:
        assert again.active == ("one",) and torch.equal(answers(again.network), first)


def test_a_certificate_is_written_anew_where_a_stopped_process_left_none(tmp_path):
    with service(tmp_path) as made:
        carry_out(made, request("one", "a"))
    page = tmp_path / "certificates" / "one.html"
    text = page.read_text()
    assert "Average precision (AP) on what was forgotten" in text
    page.unlink()
    (tmp_path / "adapters" / "left").mkdir()
    with service(tmp_path):
        assert page.read_text() == text and not (tmp_path / "adapters" / "left").exists()
    assert verify_service(tmp_path) == []


def test_a_request_is_known_again_and_not_mistaken_for_another(tmp_path):
    with service(tmp_path) as made:
        assert made.carried_out(request("one", "a")) is None
        carry_out(made, request("one", "a"))
        body = made.carried_out(ForgetRequest(id="one", classes=("a",), salt="6b" * 16))
        assert body is not None and body.request == "one"
        with pytest.raises(ArtefactError, match="applied with other content"):
            made.carried_out(request("one", "b"))


def test_another_network_and_an_unknown_request_are_refused(tmp_path):
    with service(tmp_path) as made:
        carry_out(made, request("one", "a"))
        with pytest.raises(ArtefactError, match="'two' is unknown, not in use"):
            made.revoke("two", dict)
    with pytest.raises(ArtefactError, match="belongs to a base of hash"):
        service(tmp_path, seed=1)
    assert len(Ledger(tmp_path).entries()) == 2
