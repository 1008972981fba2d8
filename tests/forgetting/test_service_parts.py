"""The parts of a service: names, figures by hand, refusals."""

from pathlib import Path

import pytest
import torch
from forgotten import forgotten, images, load
from services import images as few_images

from postgrad.core.layer_adapters import adapter_names
from postgrad.core.vision import ImageSet
from postgrad.errors import ArtefactError
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_parts import (
    accuracies,
    adapter_name,
    answers,
    baked,
    check_adapter,
    check_base,
    differences,
    noise,
    sign,
)


def test_every_request_has_an_adapter_name_of_its_own() -> None:
    names = ["a.b", "a-b", "a_b", "a__b", "a_.b", "a._b", "a_-b", "a", "A"]
    assert len({adapter_name(name) for name in names}) == len(names)
    assert adapter_name("request-1") == "request-request-1"


def test_accuracies_by_hand() -> None:
    """Of four images of classes 0, 0, 1, 2 the first three are taken for 0: 100 % of 0, none of 1 and 2."""
    labels = few_images([0, 0, 1, 2], "abc").labels
    shown = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels, ("a", "b", "c"))
    logits = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    found = accuracies(logits, shown, {"acc_r": {0}, "acc_o": {1, 2}, "acc_back": {0, 1}, "none": set()})
    assert (found["acc_r"], found["acc_o"]) == (100, 0) and found["acc_back"] == pytest.approx(200 / 3)
    assert found["acc_r_low"] < 100 == found["acc_r_high"] and "none" not in found


def test_differences_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    after = torch.tensor([[0.5, 0.0], [0.0, -1.0]])
    assert differences(before, after) == {"logit_difference": 2.0, "same_answers": 50.0}


def test_noise_fits_the_classifier(tmp_path: Path) -> None:
    classifier = load(forgotten(tmp_path).model)
    drawn = noise(classifier)
    assert drawn.images.shape == (16, 1, 8, 8) and torch.equal(drawn.images, noise(classifier).images)


def test_a_copy_is_baked_and_the_original_stays(tmp_path: Path) -> None:
    made = forgotten(tmp_path)
    reader = Service.read(made.service, load(made.model), "base")
    reader.show(["first", "second"])
    reader.show(["first"])
    expected = answers(reader.classifier, images()[1])
    copied = baked(reader.classifier, [adapter_name("first")])
    assert adapter_names(copied.network) == () and len(adapter_names(reader.classifier.network)) == 2
    assert torch.allclose(answers(copied, images()[1]), expected, atol=1e-4)
    assert torch.equal(answers(reader.classifier, images()[1]), expected)


def test_what_the_ledger_does_not_know_is_refused(tmp_path: Path) -> None:
    made = forgotten(tmp_path)
    entries = Ledger(made.service).entries()
    check_adapter(made.service, entries, "first")
    (made.service / "adapters/first/more.txt").write_text("x")
    with pytest.raises(ArtefactError, match=r"more\.txt: expected no such file"):
        check_adapter(made.service, entries, "first")
    with pytest.raises(ArtefactError, match="no request 'third' was applied"):
        check_adapter(made.service, entries, "third")
    with pytest.raises(ArtefactError, match="belongs to a base of hash"):
        check_base(made.service, entries, {}, "x")


def test_without_a_key_nothing_is_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTGRAD_SIGNING_KEY", raising=False)
    (tmp_path / "a").write_text("a")
    sign(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
