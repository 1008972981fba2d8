"""Other methods on the same requests: each from the base, one request after another."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_digits import images, job, taught

from postgrad.core.vision_models import Classifier, classifier_hash
from postgrad.errors import ConfigError
from postgrad.forgetting import comparison as module
from postgrad.forgetting.baselines import BASELINES, BaselineConfig
from postgrad.forgetting.bench import Bench
from postgrad.forgetting.comparison import SERVED, chosen, compare
from postgrad.forgetting.erase import Material
from postgrad.forgetting.erase_config import PRESETS
from postgrad.forgetting.forget import ForgetConfig, splits_of
from postgrad.forgetting.leakage_audit import AuditConfig
from postgrad.forgetting.relearn import RelearnConfig
from postgrad.forgetting.sample_audit import Scope

CONFIG = ForgetConfig(tasks=(9, 1, 2), gold=False, audit=AuditConfig(svc=False, relearn=RelearnConfig(steps=0)))


@pytest.fixture(scope="module")
def base() -> Classifier:
    return taught()


@pytest.fixture(scope="module")
def bench(base: Classifier) -> Bench:
    scopes = [Scope(split) for split in splits_of(CONFIG, images()[0], ())]
    return Bench(CONFIG.audit, images(), (), scopes, base, (), 0)


def test_names_are_checked_and_kept_in_order() -> None:
    assert chosen(()) == ()
    assert chosen(("ssd", "paper", "ssd")) == ("ssd", "paper")
    assert chosen(("ssd", "all")) == (*PRESETS, *SERVED)
    with pytest.raises(ConfigError, match=r"baselines: expected names among safe, .*ssd.* found \['ssb', 'gold'\]"):
        chosen(("ssd", "ssb", "gold"))


def test_methods_that_begin_at_fresh_weights_or_are_known_wrong_are_left_out() -> None:
    assert set(BASELINES) - set(SERVED) == {"gold", "retrain", "lwf_official"}


def test_a_preset_and_a_baseline_serve_the_requests(
    base: Classifier, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = classifier_hash(base)
    monkeypatch.setattr(module, "BaselineConfig", lambda: BaselineConfig(epochs=2, lr=1e-3))
    found = compare(("gs-lora", "finetune"), base, bench, images()[0], job(tmp_path))
    assert [(served.name, len(served.audits)) for served in found] == [("gs-lora", 2), ("finetune", 2)]
    ours, theirs = found
    assert [audit.name for audit in (*ours.audits, *theirs.audits)] == ["gs-lora"] * 2 + ["finetune"] * 2
    for audit in ours.audits:
        assert audit.accuracy.acc_f.value <= 10 and audit.accuracy.acc_r.value > 70
    assert theirs.audits[-1].accuracy.acc_r.value > 70  # finetuning keeps, whatever it forgets
    assert classifier_hash(base) == before
    assert (tmp_path / "compare" / "gs-lora" / "2").is_dir()


def test_what_a_service_would_refuse_is_shown(
    base: Classifier, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A floor of 0 and a harsh objective: the request stands in the table all the same."""
    plain = PRESETS["gs-lora"]
    steps = replace(plain.train, epochs=1, optim=replace(plain.train.optim, lr=1.0))
    harsh = replace(plain, floor=0.0, patience=0, train=steps)
    monkeypatch.setattr(module, "PRESETS", {"harsh": harsh})
    (served,) = compare(("harsh",), base, replace(bench, scopes=bench.scopes[:1]), images()[0], job(tmp_path))
    assert served.audits[0].accuracy.acc_r.value < served.audits[0].accuracy.acc_r_pretrained


def test_each_request_is_learnt_from_its_own_images(
    base: Classifier, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request finds the first one's classes forgotten, and learns nothing from them."""
    seen: list[Material] = []

    def note(name: str, model: Classifier, material: Material, number: int, folder: object) -> Classifier:
        seen.append(material)
        return model

    monkeypatch.setattr(module, "_serve", note)
    compare(("ssd",), base, bench, images()[0], job(tmp_path))
    for number, (material, split) in enumerate(zip(seen, bench.splits, strict=True)):
        assert set(material.forget.labels.tolist()) == set(split.forget)
        assert set(material.retain.labels.tolist()) == set(split.remain)
        assert (material.task, material.old) == (number, split.old)
    assert seen[1].old == bench.splits[0].forget
