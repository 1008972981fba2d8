"""Every recipe loads strictly and can be planned; those on real data only where the data is there."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from postgrad.__main__ import main
from postgrad.core.config import ModelConfig, load_config
from postgrad.core.models import load_lm, save_model
from postgrad.core.runtime import Job
from postgrad.methods import METHODS, config_class

pytestmark = pytest.mark.xdist_group("recipes")
REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.toml"))
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
Folders = pytest.TempPathFactory


def method_of(recipe: Path) -> str:
    """Read the method from the file's name."""
    return recipe.stem.split("_")[0]


def reads_data(recipe: Path) -> bool:
    """Say whether a recipe reads what scripts/real_data writes."""
    return '"data/' in recipe.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: Folders) -> Path:
    """A folder with data/ as scripts/real_data writes it, and the recipes, whose templates some plans read."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "recipes").symlink_to(REPOSITORY / "recipes")
    command = [sys.executable, str(REPOSITORY / "scripts" / "real_data"), str(shared / "data"), str(folder / "data")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: Folders) -> Path:
    """A folder in which the hub's names are small local folders."""
    folder = tmp_path_factory.mktemp("hub")
    device = torch.device("cpu")
    job = Job("test", folder, 0, device, torch.float32, 0, 1, True)
    model, tokenizer = load_lm(ModelConfig(tiny_width=16, tiny_layers=1), job)
    save_model(model, tokenizer, folder / "Qwen" / "Qwen2.5-0.5B")
    turns = [[("user", f"question {i}"), ("assistant", f"answer {i}")] for i in range(200)]
    talks = [[{"role": role, "content": text} for role, text in talk] for talk in turns]
    worse = [[talk[0], {"role": "assistant", "content": "no"}] for talk in talks]
    for name, rows in {
        "ultrachat_200k/train_sft": [{"messages": talk} for talk in talks],
        "no_robots/train": [{"prompt": talk[0]["content"], "messages": talk} for talk in talks],
        "ultrafeedback_binarized/train_prefs": [
            {"prompt": talk[0]["content"], "chosen": talk, "rejected": bad}
            for talk, bad in zip(talks, worse, strict=True)
        ],
    }.items():
        path = folder / "HuggingFaceH4" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    return folder


def test_there_are_recipes() -> None:
    """A glob that finds nothing would make every other test pass."""
    assert len(RECIPES) >= 4


@every_recipe
def test_a_recipe_loads_strictly(recipe: Path) -> None:
    """Named after its method, which its first line repeats; a run folder of the same name; in the table."""
    name = method_of(recipe)
    assert name in METHODS
    assert recipe.read_text(encoding="utf-8").startswith(f"# postgrad {name}\n")
    config = load_config(config_class(name), recipe)
    assert config.runtime.folder == f"runs/{recipe.stem}"
    assert recipe.name in (REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8")


@every_recipe
def test_a_recipe_can_be_planned(
    recipe: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dry run reads the data, counts steps and parameters, and writes nothing."""
    folder = request.getfixturevalue("real" if reads_data(recipe) else "hub")
    monkeypatch.chdir(folder)
    assert main([method_of(recipe), str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "optimizer steps" in out or "training images" in out
    assert not (folder / "runs").exists()


def test_real_data_is_split_by_question(real: Path) -> None:
    """The two halves of TruthfulQA, for the reward model and for its judge, share no question."""
    parts = []
    for name in ("first", "second"):
        lines = (real / "data" / f"truthfulqa_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts.append({json.loads(line)["prompt"] for line in lines})
    assert min(map(len, parts)) > 300 and not parts[0] & parts[1]
