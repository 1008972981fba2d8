import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW

from postgrad.core.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from postgrad.errors import ArtefactError


class Tied(nn.Module):
    """Two names for one weight, a frozen layer, a view of a larger memory, and buffers of both kinds."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.part = nn.Parameter(torch.arange(10.0)[2:6])
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def stepped(width: int = 3, steps: int = 2) -> tuple[Tied, AdamW]:
    torch.manual_seed(0)
    model = Tied(width)
    optimizer = AdamW([param for param in model.parameters() if param.requires_grad], lr=0.1)
    for _ in range(steps):
        (model.head.weight.sin().sum() + model.part.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.count += steps
    return model, optimizer


def test_comes_back_as_it_went(tmp_path: Path) -> None:
    model, optimizer = stepped()
    path = save_checkpoint(tmp_path, 12, model, optimizer, {"a": [1, 0.1]})
    assert path.name == "step-00000012" and latest_checkpoint(tmp_path) == path
    assert sorted(load_file(path / "model.safetensors")) == ["count", "embed.weight", "part"]
    other, fresh = stepped(steps=0)
    assert load_checkpoint(path, other, fresh) == {"a": [1, 0.1]}
    for _ in range(2):
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for m, o in ((model, optimizer), (other, fresh)):
            (m.head.weight.sin().sum() + m.part.square().sum()).backward()
            o.step()


def test_the_same_state_makes_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        path = save_checkpoint(tmp_path / name, 1, *stepped(), {"x": 0.1})
        files.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert files[0] == files[1] and len(files[0]) == 4


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    model, optimizer = stepped()
    for step in (1, 2, 3, 100):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000100"]
    save_checkpoint(tmp_path, 4, model, optimizer, {}, keep=1)  # after falling back, later ones go
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    model, optimizer = stepped()
    (save_checkpoint(tmp_path, 1, model, optimizer, {}) / "state.json").unlink()
    save_checkpoint(tmp_path, 1, model, optimizer, {"again": True})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path / "step-00000001", model) == {"again": True}


def test_leftovers_of_a_killed_run_go(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-00000002.0123.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, 1, *stepped(), {})
    assert list(tmp_path.iterdir()) == [path]


def test_none_yet(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("model.safetensors", "flip", "sha256"),
        ("optimizer.safetensors", "cut", "bytes"),
        ("state.json", "delete", "No such file"),
        ("manifest.json", "cut", "JSONDecodeError"),
        ("manifest.json", "empty", "KeyError"),
    ],
)
def test_damage_is_seen(tmp_path: Path, name: str, damage: str, text: str) -> None:
    model, optimizer = stepped()
    first = save_checkpoint(tmp_path, 1, model, optimizer, {})
    file = save_checkpoint(tmp_path, 2, model, optimizer, {}) / name
    data = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "cut":
            file.write_bytes(data[:-5])
        case "empty":
            file.write_text("{}")
        case "delete":
            file.unlink()
    with pytest.warns(UserWarning, match=rf"step-00000002: .*{text}.*before"):
        assert latest_checkpoint(tmp_path) == first


@pytest.mark.filterwarnings("ignore:Damaged checkpoint")
def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        (save_checkpoint(tmp_path, step, *stepped(), {}) / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"(?s)found none.*step-00000002.*step-00000001.*Delete"):
        latest_checkpoint(tmp_path)


def test_another_model_is_named_by_its_first_tensor(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *stepped(), {})
    with pytest.raises(ArtefactError, match=r"'embed.weight' is float32 \[4, 4\] in the model and float32 \[3, 3\]"):
        load_checkpoint(path, Tied(4))
    with pytest.raises(ArtefactError, match=r"'part' is bfloat16 \[4\] in the model"):
        load_checkpoint(path, Tied().bfloat16())
    more = Tied()
    more.frozen.bias.requires_grad_(True)
    with pytest.raises(ArtefactError, match=r"'frozen.bias' is float32 \[2\] in the model and no such tensor in"):
        load_checkpoint(path, more)
    less = Tied()
    less.part.requires_grad_(False)
    with pytest.raises(ArtefactError, match=r"'part' is no such tensor that trains in the model and float32 \[4\]"):
        load_checkpoint(path, less)


def test_a_refused_checkpoint_changes_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *stepped(), {})
    model = Tied()
    model.count = torch.zeros(5)
    before = model.embed.weight.clone()
    with pytest.raises(ArtefactError, match="'count'"):
        load_checkpoint(path, model)
    assert torch.equal(model.embed.weight, before)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_leaves_the_last_one_valid(tmp_path: Path) -> None:
    model, optimizer = stepped()
    first = save_checkpoint(tmp_path, 1, model, optimizer, {})
    with (
        files_of_at_most(100),
        pytest.raises(ArtefactError, match=r"Cannot write checkpoint .*step-00000002: .*step-00000001 stays valid"),
    ):
        save_checkpoint(tmp_path, 2, model, optimizer, {})
    assert list(tmp_path.iterdir()) == [first] and latest_checkpoint(tmp_path) == first


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("postgrad.core.checkpoint.save_file", full)
    with pytest.raises(ArtefactError, match=r"No space left on device. Free some space; there is no earlier one"):
        save_checkpoint(tmp_path, 2, *stepped(), {})
    assert list(tmp_path.iterdir()) == []


def test_state_is_readable(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, *stepped(), {"tokens": 5})
    state = json.loads((path / "state.json").read_text())
    assert state == {"extra": {"tokens": 5}, "optimizer": {}, "step": 3}
    assert sorted(load_file(path / "optimizer.safetensors"))[:3] == [
        "embed.weight/exp_avg", "embed.weight/exp_avg_sq", "embed.weight/step",
    ]  # fmt: skip
