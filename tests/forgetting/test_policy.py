"""Policies: each limit from both sides, and no figure is no pass."""

from pathlib import Path

import pytest

from postgrad.core.config import load_config
from postgrad.errors import ConfigError
from postgrad.forgetting.policy import (
    LATER,
    SINGLE,
    PolicyConfig,
    check_policy,
    judge,
    passes,
    policy_limits,
    read_limits,
    read_policy,
)

POLICY = PolicyConfig(max_blocks=3)
GOOD = {
    "acc_f": 1.0,
    "acc_r": 95.5,
    "acc_r_pretrained": 97.5,
    "acc_o": 2.0,
    "mia_auc": 0.59,
    "knn_excess": 10.0,
    "probe_excess": -3.0,
    "num_changed_blocks": 3.0,
    "min_shots": 4.0,
}


SINGLE_GOOD = {
    SINGLE: 5.0,
    "acc_f": 100.0,
    "acc_excess": 10.0,
    "mia_excess": -0.15,
    "acc_r": 95.5,
    "acc_r_pretrained": 97.5,
    "num_changed_blocks": 3.0,
    "min_shots": 1.0,
    "num_earlier": 1.0,
    "num_old_classes": 0.0,
}


def outcomes(**change: float) -> dict[str, str]:
    return {verdict.name: verdict.outcome for verdict in judge(POLICY, {**GOOD, **change})}


def test_limits_themselves_are_met() -> None:
    verdicts = judge(POLICY, GOOD)
    assert [v.name for v in verdicts] == [n for n in policy_limits(POLICY) if n not in LATER] and passes(verdicts)
    assert [v.limit for v in verdicts] == [limit for n, limit in policy_limits(POLICY).items() if n not in LATER]
    drop = next(v for v in verdicts if v.name == "acc_r_min_drop")
    assert drop.found == 2.0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("acc_f_max", {"acc_f": 1.01}),
        ("acc_r_min_drop", {"acc_r": 95.4}),
        ("acc_r_min_drop", {"acc_r_pretrained": 97.6}),
        ("acc_o_max", {"acc_o": 2.1}),
        ("mia_auc_band", {"mia_auc": 0.61}),
        ("mia_auc_band", {"mia_auc": 0.39}),
        ("knn_excess_max", {"knn_excess": 10.1}),
        ("probe_excess_max", {"probe_excess": 11.0}),
        ("max_blocks", {"num_changed_blocks": 4.0}),
        ("few_shot_min", {"min_shots": 3.0}),
        ("acc_f_max", {"acc_f": float("nan")}),
    ],
)
def test_one_step_beyond_fails_that_check_alone(name: str, change: dict[str, float]) -> None:
    found = outcomes(**change)
    assert found.pop(name) == "failed" and set(found.values()) == {"met"}


@pytest.mark.parametrize("missing", GOOD)
def test_what_is_missing_is_not_measured_and_no_pass(missing: str) -> None:
    verdicts = judge(POLICY, {name: value for name, value in GOOD.items() if name != missing})
    unknown = [verdict for verdict in verdicts if verdict.outcome == "not measured"]
    assert len(unknown) == 1 and unknown[0].found is None and not unknown[0].passed and not passes(verdicts)


def test_a_gold_model_may_be_lacking_and_is_said_to_be() -> None:
    verdicts = judge(POLICY, {})
    assert {verdict.outcome for verdict in verdicts} == {"not measured"} and not passes(verdicts)


def test_the_first_request_has_no_earlier_ones_to_keep_forgotten() -> None:
    without = {name: value for name, value in GOOD.items() if name != "acc_o"}
    assert passes(judge(POLICY, {**without, "num_earlier": 0.0}))
    assert not passes(judge(POLICY, {**without, "num_earlier": 1.0}))
    assert passes(judge(POLICY, {**without, "num_earlier": 1.0, "num_old_classes": 0.0})), "single images only"


def test_zero_means_any_number() -> None:
    names = [verdict.name for verdict in judge(PolicyConfig(max_blocks=0, few_shot_min=0), GOOD)]
    assert "max_blocks" not in names and "few_shot_min" not in names


def test_a_policy_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("acc_f_max = 0\nmax_blocks = 2\n")
    assert load_config(PolicyConfig, path) == PolicyConfig(acc_f_max=0.0, max_blocks=2)
    path.write_text("acc_f_maxx = 0\n")
    with pytest.raises(ConfigError, match=r"policy.toml: unknown key 'acc_f_maxx'; nearest is 'acc_f_max'"):
        load_config(PolicyConfig, path)


def test_a_policy_comes_back_from_the_ledger() -> None:
    assert read_limits(policy_limits(POLICY)) == POLICY
    with pytest.raises(ConfigError, match=r"expected the limits acc_f_max, .*; found acc_f"):
        read_limits({"acc_f": 1.0})
    old = {name: value for name, value in policy_limits(POLICY).items() if name not in LATER}
    assert read_limits(old) == POLICY
    for wrong in ({**old, "acc_excess": 1.0}, {name: value for name, value in old.items() if name != "acc_f_max"}):
        with pytest.raises(ConfigError, match="expected the limits"):
            read_limits(wrong)


def test_single_images_may_be_named_but_not_more_than_unseen_ones() -> None:
    """Neither their accuracy nor the number of them is limited; what is above a model that never saw them is."""
    verdicts = judge(POLICY, SINGLE_GOOD)
    assert passes(verdicts)
    assert [v.name for v in verdicts] == ["acc_r_min_drop", "acc_excess_max", "mia_excess_max", "max_blocks"]
    later = judge(POLICY, {**SINGLE_GOOD, "num_old_classes": 2.0})
    assert [v.name for v in later if v.outcome == "not measured"] == ["acc_o_max"]
    for name, change in (
        ("acc_excess_max", {"acc_excess": 10.1}), ("mia_excess_max", {"mia_excess": 0.16}),
        ("mia_excess_max", {"mia_excess": -0.16}), ("acc_r_min_drop", {"acc_r": 95.0}),
    ):  # fmt: skip
        assert [v.name for v in judge(POLICY, {**SINGLE_GOOD, **change}) if not v.passed] == [name]
    for missing in ("acc_excess", "mia_excess", "acc_r"):
        found = judge(POLICY, {name: value for name, value in SINGLE_GOOD.items() if name != missing})
        assert [v.outcome for v in found].count("not measured") == 1 and not passes(found)


@pytest.mark.parametrize(
    "change",
    [
        {"acc_f_max": 101.0},
        {"acc_o_max": -1.0},
        {"mia_auc_band": 0.6},
        {"knn_excess_max": 1e3},
        {"max_blocks": -1},
        {"acc_excess_max": 101.0},
        {"mia_excess_max": 1.1},
    ],
)
def test_limits_out_of_range_are_refused(change: dict[str, float]) -> None:
    check_policy(PolicyConfig())
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: expected .* found .* Mend the policy"):
        check_policy(PolicyConfig(**change))  # type: ignore[arg-type]


def test_a_policy_is_read_from_a_file_or_is_the_usual_one(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("acc_f_max = 5.0\n")
    assert read_policy("") == PolicyConfig() and read_policy(str(tmp_path / "policy.toml")).acc_f_max == 5.0
    with pytest.raises(ConfigError, match=r"nowhere\.toml: expected a policy, a TOML or JSON file"):
        read_policy(str(tmp_path / "nowhere.toml"))
