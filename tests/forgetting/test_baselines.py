"""Every baseline on a small problem: what it does to both sides, what it trains, seeds, resuming, refusals."""

import copy
import json
from dataclasses import replace

import pytest
import tiny_vision
import torch
from tiny_vision import accuracy, job, weights

from postgrad.core.config import dump_config, load_config
from postgrad.core.vision import ImageSet
from postgrad.errors import ArtefactError, ConfigError, DataError
from postgrad.forgetting import baselines
from postgrad.forgetting.baselines import BASELINES, BaselineConfig, check_baselines, observe, run_baseline
from postgrad.forgetting.baselines_table import settled
from postgrad.forgetting.distillation import attention_map

CONFIG = BaselineConfig(epochs=7, lr=0.01, batch_size=16, numbers=("ssd.alpha=2",))
"""21 steps, or 28 of methods that pass over one side after the other."""
FRESH = ("gold", "retrain")
KEEPS = ("gold", "retrain", "finetune")
SLOW = {"fdr": 0.03, "der_logits": 3e-3}
"""Learning rates of those that 20 steps at 0.01 do not bring there, or too far."""


@pytest.fixture(scope="module")
def original():
    classifier = tiny_vision.taught().eval()
    forget, retain = tiny_vision.sides(tiny_vision.images(16, 0))
    assert accuracy(classifier, forget) == 1 and accuracy(classifier, retain) == 1
    return classifier


@pytest.fixture(scope="module")
def data():
    return tiny_vision.sides(tiny_vision.images(16, 0))


@pytest.fixture(scope="module")
def outcomes(original, data, tmp_path_factory):
    """Each baseline's classifier."""
    folder, before = tmp_path_factory.mktemp("all"), weights(original)
    found = {}
    for name in BASELINES:
        start = tiny_vision.fresh(1) if name in FRESH else original
        config = replace(CONFIG, lr=SLOW.get(name, CONFIG.lr))
        found[name] = run_baseline(name, start, *data, config, job(folder))
    assert all(torch.equal(value, before[name]) for name, value in weights(original).items())
    return found


@pytest.mark.parametrize("name", BASELINES)
def test_forgets_what_it_should_and_keeps_the_rest(name, outcomes):
    forget, retain = tiny_vision.sides(tiny_vision.images(50, 1))
    kept, left = accuracy(outcomes[name], retain), accuracy(outcomes[name], forget)
    assert kept >= 0.8, f"retained accuracy {kept}"
    if name != "finetune":
        assert left <= 0.3, f"forgotten accuracy {left}"


@pytest.mark.parametrize("name", BASELINES)
def test_only_the_chosen_part_moves_and_flags_come_back(name, outcomes, original):
    start = weights(tiny_vision.fresh(1) if name in FRESH else original)
    moved = {own for own, value in weights(outcomes[name]).items() if not torch.equal(value, start[own])}
    assert moved
    match BASELINES[name].trains:
        case "body":
            assert not any("head" in own for own in moved)
        case "lower":
            assert all("embed" in own or "blocks.0" in own or "blocks.1" in own for own in moved)
    assert all(param.requires_grad for param in outcomes[name].parameters()) and not outcomes[name].training


def test_salun_moves_the_share_of_its_mask(outcomes, original):
    start, end = weights(original), weights(outcomes["salun"])
    moved = sum(int((end[name] != value).sum()) for name, value in start.items())
    total = sum(value.numel() for value in start.values())
    assert 0.45 * total < moved <= round(0.5 * total)


def test_the_official_lwf_is_relabelling_and_replay(outcomes, original, data, tmp_path):
    config = replace(CONFIG, numbers=("lwf.kd=0",))
    without = run_baseline("lwf", original, *data, config, job(tmp_path))
    same = weights(outcomes["lwf_official"])
    assert all(torch.equal(value, same[name]) for name, value in weights(without).items())


@pytest.mark.parametrize("name", ["ewc", "scrub_s", "salun"])
def test_the_same_seed_gives_the_same_weights(name, outcomes, original, data, tmp_path):
    again = run_baseline(name, original, *data, CONFIG, job(tmp_path / "again"))
    other = run_baseline(name, original, *data, CONFIG, job(tmp_path / "other", seed=1))
    want = weights(outcomes[name])
    assert all(torch.equal(value, want[own]) for own, value in weights(again).items())
    assert any(not torch.equal(value, want[own]) for own, value in weights(other).items())


@pytest.mark.parametrize("name", ["ewc", "scrub_s", "lirf"])
def test_a_stopped_run_ends_in_the_same_bytes(name, outcomes, original, data, tmp_path, monkeypatch):
    real, calls, config = baselines.baseline_step, [], replace(CONFIG, save_every=5)

    def stopping(task, objective, batch, step):
        calls.append(step)
        if len(calls) == 13:
            raise RuntimeError("pulled the plug")
        return real(task, objective, batch, step)

    monkeypatch.setattr(baselines, "baseline_step", stopping)
    with pytest.raises(RuntimeError, match="plug"):
        run_baseline(name, original, *data, config, job(tmp_path))
    monkeypatch.setattr(baselines, "baseline_step", real)
    resumed = run_baseline(name, original, *data, config, job(tmp_path))
    want = weights(outcomes[name])
    assert all(torch.equal(value, want[own]) for own, value in weights(resumed).items())
    finished = run_baseline(name, original, *data, config, job(tmp_path))
    assert all(torch.equal(value, want[own]) for own, value in weights(finished).items())


def test_micro_batches_change_nothing_but_rounding(outcomes, original, data, tmp_path):
    config = replace(CONFIG, micro_images=5)
    split = run_baseline("ewc", original, *data, config, job(tmp_path))
    for name, value in weights(split).items():
        torch.testing.assert_close(value, weights(outcomes["ewc"])[name], rtol=0.01, atol=0.002)


def test_ssd_over_all_images_cannot_choose_beyond_the_inverse_share(original, data, tmp_path):
    """A quarter is forgotten, so no mean square of gradients is over four times the one on all images."""
    for alpha, changes in ((4.1, False), (2.0, True)):
        config = replace(CONFIG, numbers=("ssd.whole=1", f"ssd.alpha={alpha}"))
        got = weights(run_baseline("ssd", original, *data, config, job(tmp_path / str(alpha))))
        assert changes == any(not torch.equal(value, got[name]) for name, value in weights(original).items())


def test_a_part_of_ones_own_choice(original, data, tmp_path):
    config = replace(CONFIG, trains="last", last_blocks=1)
    got = weights(run_baseline("finetune", original, *data, config, job(tmp_path)))
    moved = {name for name, value in weights(original).items() if not torch.equal(value, got[name])}
    assert moved and all("blocks.3" in name or "norm" in name or "head" in name for name in moved)


def test_official_labels_and_columns_go_by_position(original, data, tmp_path):
    baseline, stage = settled("lirf_official", CONFIG), job(tmp_path)
    task = baselines._prepare(baseline, copy.deepcopy(original), *data, replace(CONFIG, labels="official"), stage)
    assert task.allowed == (0,) and task.columns == (1, 2, 3)
    task = baselines._prepare(settled("lirf", CONFIG), copy.deepcopy(original), *data, CONFIG, stage)
    assert task.allowed == task.columns == (0, 2, 3)
    bound = baselines._prepare(settled("neggrad", CONFIG), copy.deepcopy(original), *data, CONFIG, stage)
    assert bound.numbers["bound"] == pytest.approx(2 * torch.tensor(4.0).log().item())


def test_observing_gives_outputs_and_attention(original, data, tmp_path):
    forget, _ = data
    original.train()
    seen, maps = observe(original, forget, 5, job(tmp_path), "blocks.1")
    assert original.training
    original.eval()
    with torch.no_grad():
        whole = original(forget.images)
        tokens = original.network.embed(original.pixels(forget.images)[:, 0])
        tokens = original.network.blocks[1](original.network.blocks[0](tokens))
    torch.testing.assert_close(seen.logits, whole.logits)
    torch.testing.assert_close(seen.features, whole.features)
    torch.testing.assert_close(maps, attention_map(tokens))


def test_gold_needs_nothing_to_forget(data, tmp_path):
    forget, retain = data
    trained = run_baseline("gold", tiny_vision.fresh(1), forget.select([]), retain, CONFIG, job(tmp_path))
    assert accuracy(trained, retain) > 0.6


def test_another_requests_folder_is_refused(original, data, tmp_path):
    forget, retain = data
    short = replace(CONFIG, epochs=1)
    run_baseline("finetune", original, forget, retain, short, job(tmp_path))
    mark = json.loads((tmp_path / "baselines/finetune/baseline.json").read_text())
    assert mark["settings"]["epochs"] == 1
    for start, kept, seed, what in (
        (tiny_vision.fresh(1), retain, 0, "classifier"),
        (original, retain.select(range(40)), 0, "retain"),
        (original, retain, 1, "seed"),
    ):
        with pytest.raises(ArtefactError, match=f"found another {what}"):
            run_baseline("finetune", start, forget, kept, short, job(tmp_path, seed))


def test_what_makes_no_sense_is_refused(original, data, tmp_path):
    forget, retain = data
    with pytest.raises(ConfigError, match="'finetun'; nearest is 'finetune'"):
        run_baseline("finetun", original, forget, retain, CONFIG, job(tmp_path))
    with pytest.raises(DataError, match="found 48 and 0"):
        run_baseline("neggrad", original, forget.select([]), retain, CONFIG, job(tmp_path))
    other = ImageSet(retain.images, retain.labels, ("a", "b", "c", "e"))
    with pytest.raises(DataError, match="classifier's 4 classes"):
        run_baseline("neggrad", original, forget, other, CONFIG, job(tmp_path))
    with pytest.raises(ConfigError, match="weight_decay: expected 0 for salun"):
        settled("salun", BaselineConfig(weight_decay=0.1))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("ssd.beta=1", "'ssd.beta=1'. There are ssd.alpha, ssd.lambda, ssd.whole"),
        ("ssd.alpha", "finite number"),
        ("ssd.alpha=x", "finite"),
        ("alpha=1", "found"),
    ],
)
def test_numbers_are_checked(entry, message):
    with pytest.raises(ConfigError, match=message):
        check_baselines(BaselineConfig(numbers=(entry,)))


def test_settings_take_the_place_of_a_methods_own(tmp_path):
    own = settled("lwf", BaselineConfig())
    assert (own.epochs, own.lr, own.weight_decay, own.trains) == (100, 1e-4, 0.05, "body")
    config = BaselineConfig(epochs=3, lr=0.1, weight_decay=0.0, trains="all", numbers=("lwf.kd=2", "ssd.alpha=9"))
    set_ = settled("lwf", config)
    assert (set_.epochs, set_.lr, set_.weight_decay, set_.trains) == (3, 0.1, 0.0, "all")
    assert set_.numbers == {**own.numbers, "kd": 2.0}
    (tmp_path / "recipe.toml").write_text(dump_config(config))
    assert load_config(BaselineConfig, tmp_path / "recipe.toml") == config
    with pytest.raises(ConfigError, match="batch_size of 1 or more"):
        check_baselines(BaselineConfig(batch_size=0))
