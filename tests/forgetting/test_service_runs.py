"""What commands on a service share: copies, bases, images, and what a run has done so far."""

from dataclasses import replace
from pathlib import Path

import pytest
from forgotten import DATA, SEED, Made, forgotten, images, job, load

from postgrad.core.vision_models import ClassifierConfig, classifier_hash
from postgrad.errors import ConfigError
from postgrad.forgetting.entries import RevokeBody
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_runs import (
    ServiceImages,
    check_service,
    entries_of_run,
    in_use,
    load_base,
    workplace,
)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return forgotten(tmp_path)


def test_a_service_needs_its_trained_base(made: Made, tmp_path: Path) -> None:
    check_service(str(made.service), ClassifierConfig(path=str(made.model)))
    for path in ("tiny", "face"):
        with pytest.raises(ConfigError, match=f"found '{path}', which is drawn anew"):
            check_service(str(made.service), ClassifierConfig(path=path))
    with pytest.raises(ConfigError, match="expected a service folder"):
        check_service(str(tmp_path), ClassifierConfig(path=str(made.model)))


def test_a_rehearsal_goes_on_with_its_copy(made: Made, tmp_path: Path) -> None:
    run = job(tmp_path / "run")
    assert workplace(str(made.service), False, run) == made.service
    copy = workplace(str(made.service), True, run)
    (copy / "mine").write_text("x")
    assert copy != made.service and workplace(str(made.service), True, run) == copy
    assert (copy / "mine").is_file() and not (copy / ".lock").exists()
    assert in_use(Ledger(copy).entries()) == ["first", "second"]


def test_the_entries_of_a_run_are_those_since_it_began(made: Made, tmp_path: Path) -> None:
    run = job(tmp_path / "run")
    assert entries_of_run(made.service, run) == []
    with Service.open(made.service, load(made.model), "base") as service:
        service.revoke("first", images()[1])
    (entry,) = entries_of_run(made.service, run)
    assert isinstance(entry.body, RevokeBody)
    assert entries_of_run(made.service, job(tmp_path / "another")) == []


def test_a_base_is_loaded_with_or_without_images(made: Made, tmp_path: Path) -> None:
    config = ClassifierConfig(path=str(made.model))
    expected = classifier_hash(load(made.model))
    for shown in (None, images()[1]):
        classifier = load_base(config, made.service, job(tmp_path / "run"), shown)
        assert classifier_hash(classifier) == expected and not classifier.training


def test_images_are_those_that_a_seed_held_out(made: Made, tmp_path: Path) -> None:
    shown = ServiceImages(replace(DATA, limit=120), made.service, job(tmp_path / "run"))
    assert shown.of(SEED) is shown.of(SEED)
    assert shown.of(SEED).hashes != shown.of(SEED + 1).hashes
