"""The pipeline: its checks, its order, its gate, and the same bytes after a kill at any point."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cases import case
from tiny_stages import contents

from postgrad.alignment import align
from postgrad.alignment.align import AlignConfig, check, reward_gate, run, split_prompts, stages
from postgrad.alignment.judge import JudgeConfig
from postgrad.core.config import dump_config
from postgrad.core.items import Prompt, prompt_id
from postgrad.errors import ConfigError, GateError


def test_stages_hand_their_folders_on():
    found = {stage.name: stage for stage in stages(AlignConfig(), Path("r"))}
    assert tuple(found) == align.STAGES
    assert found["annotate"].config.data.path == "r/candidates"
    assert found["reward"].config.data.path == "r/annotate"
    assert found["sample"].config.reward == "r/reward/model"
    assert found["control"].config.pick == "random"
    assert found["rejection"].config.pick == "rank"
    assert found["dpo"].config.model.path == "r/rejection/model"
    assert found["evaluate"].config.policies[0] == "sft=r/sft/model"
    assert all(stage.config.runtime.folder == f"r/{name}" for name, stage in found.items())


def test_preferences_replace_the_judge_and_control_can_be_left_out():
    config = AlignConfig(conversations="c", prompts="p", preferences="f.jsonl", control=False, dpo_from="sft")
    found = {stage.name: stage for stage in stages(config, Path("r"))}
    assert list(found) == ["sft", "reward", "sample", "rejection", "dpo", "evaluate"]
    assert found["reward"].config.data.path == "f.jsonl"
    assert found["dpo"].config.model.path == "r/sft/model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": "a.jsonl"}, "prompts is empty"),
        ({"preferences": "a.jsonl"}, "prompts is empty"),
        ({"shares": (0.9, 0.2)}, "shares"),
        ({"conversations": "a", "prompts": "b"}, "rule judge"),
        ({"sft": replace(AlignConfig().sft, data=replace(AlignConfig().sft.data, path="x"))}, "sft.data.path"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(AlignConfig(), **change))


def test_own_data_with_a_reward_judge_is_fine():
    judge = JudgeConfig(kind="reward", reward="model")
    check(AlignConfig(conversations="a", prompts="b", annotate=replace(AlignConfig().annotate, judge=judge)))


def test_prompts_are_split_once_by_hash():
    prompts = [Prompt(prompt_id(m), m) for m in (({"role": "user", "content": str(i)},) for i in range(400))]
    parts = split_prompts(prompts, (0.5, 0.15), seed=0)
    assert sorted(p.id for part in parts.values() for p in part) == sorted(p.id for p in prompts)
    assert 160 < len(parts["candidates"]) < 240
    assert 35 < len(parts["held_out"]) < 90
    again = split_prompts(prompts[::-1], (0.5, 0.15), seed=0)
    assert {p.id for p in again["set"]} == {p.id for p in parts["set"]}


def test_gate_wants_more_than_length():
    good = {"accuracy": 0.8, "length_rule": 0.6}
    assert reward_gate(good, "refuse").kind == "good"
    for weak in ({"accuracy": 0.6, "length_rule": 0.6}, {"accuracy": 0.6, "length_rule": 0.3}, {}):
        with pytest.raises(GateError, match="--gate warn"):
            reward_gate(weak, "refuse")
        assert reward_gate(weak, "warn").kind == "warning"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One run that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    config = replace(case("align", folder), runtime=replace(case("align", folder).runtime, folder=str(folder / "run")))
    return config, folder / "run", run(config)


def test_all_stages_leave_their_artefacts(straight):
    _, folder, report = straight
    for name in ("sft", "reward", "rejection", "control", "dpo"):
        assert (folder / name / "model" / "model.safetensors").is_file()
    for store in ("candidates/responses", "annotate/pairs", "sample/responses", "sample/scores", "rejection/selected"):
        assert (folder / store / "manifest.json").is_file()
    assert {"sft_gold", "control_gold", "rejection_gold", "dpo_gold"} <= set(report.results)
    page = (folder / "report.html").read_text()
    assert "What each stage cost" in page
    assert page.count("<svg") >= 3
    assert (folder / "config.toml").read_text().endswith(dump_config(straight[0]))


def test_no_prompt_is_used_twice(straight):
    _, folder, _ = straight
    texts = {
        name: {json.dumps(row) for row in pq.read_table(folder / "data" / f"{name}.parquet")["messages"].to_pylist()}
        for name in ("candidates", "set", "held_out")
    }
    assert not texts["candidates"] & texts["set"]
    assert not (texts["candidates"] | texts["set"]) & texts["held_out"]


def test_a_finished_run_answers_at_once(straight):
    config, folder, report = straight
    before = contents(folder)
    assert run(config).results == report.results
    assert contents(folder) == before


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_anywhere_ends_in_the_same_bytes(straight, tmp_path, seed):
    """SIGKILL after a random time, again and again, until the command ends by itself."""
    config, folder, _ = straight
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_config(config))
    command = [sys.executable, "-m", "postgrad", "align", str(recipe), "--runtime.folder", str(tmp_path / "run")]
    rng = random.Random(seed)
    kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        began = time.monotonic()
        while not (tmp_path / "run" / "config.toml").exists() and process.poll() is None:
            time.sleep(0.01)  # what comes before is start-up
        wait = rng.uniform(0.2, 4.0) if kills < 4 else 300.0
        try:
            _, error = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, error.decode()
        break
    assert kills > 0, f"the run ended in {time.monotonic() - began:.1f} s, before any kill"
    ours, theirs = contents(tmp_path / "run"), contents(folder)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name] != theirs[name] and not name.endswith(("stages.jsonl", ".toml"))]
    hashes_of_paths = {"manifest.json", "settings.json"}  # name the folder they were made from
    assert [name for name in different if Path(name).name not in hashes_of_paths] == []
