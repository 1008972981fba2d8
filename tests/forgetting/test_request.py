"""Requests: strict files, hashes that tell nothing, and places in a data set."""

import hashlib
import hmac
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from services import images

from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.request import (
    ForgetRequest,
    class_prints,
    fingerprint,
    manifest_hash,
    overlaps,
    read_request,
    read_requests,
    request_hash,
    resolve,
    with_salt,
    write_request,
)

SALT = "0f" * 16


DATA = images([0, 0, 1, 1, 2, 2, 3], "abcde")
REQUEST = ForgetRequest(id="r1", classes=("a",), salt=SALT)


def write(path: Path, **table: Any) -> Path:
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def test_a_file_is_read_back(tmp_path: Path) -> None:
    request = ForgetRequest(
        id="2041",
        classes=("Æ b", 'c"'),
        samples=("00000000000000aa",),
        reason="consent withdrawn",
        legal_basis="GDPR Art. 17(1)(b)",
        requester_hash=fingerprint(SALT, "Ada Lovelace"),
        deadline="2026-06-01",
        shots=4,
        salt=SALT,
    )
    write_request(tmp_path / "r.json", request)
    assert read_request(tmp_path / "r.json") == request
    assert read_request(write(tmp_path / "s.json", id="1", classes=["a"])) == ForgetRequest(id="1", classes=("a",))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"classes": ["a"]}, "id: this setting has no default"),
        ({"id": "1", "clases": ["a"]}, "unknown key 'clases'; nearest is 'classes'"),
        ({"id": 1, "classes": ["a"]}, r"id: expected text in quotes, found 1"),
        ({"id": "1", "classes": "a"}, r"classes: expected a list, found 'a'"),
        ({"id": "1", "classes": [8]}, r"classes\[0\]: expected text in quotes, found 8"),
        ({"id": "../1", "classes": ["a"]}, r"id: expected letters, digits.*found '../1'"),
        ({"id": "1"}, "classes: expected classes or samples to forget, found neither"),
        ({"id": "1", "classes": ["a", "b", "a"]}, "classes: 'a' stands there twice"),
        ({"id": "1", "samples": ["aa"]}, "samples: expected 16 hex digits"),
        ({"id": "1", "samples": ["00000000000000AA"]}, "samples: expected 16 hex digits"),
        ({"id": "1", "classes": ["a"], "salt": "secret"}, "salt: expected at least 32 hex digits"),
        ({"id": "1", "classes": ["a"], "shots": -1}, "shots: expected 0"),
        ({"id": "1", "classes": ["a"], "deadline": "1 June"}, "deadline: expected a day such as 2026-06-01"),
        ({"id": "1", "classes": ["a"], "deadline": "20260601"}, "deadline: expected a day"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_file_and_key(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "r.json", **table)
    with pytest.raises(ConfigError, match=message) as caught:
        read_request(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_name_in_place_of_its_hash_is_not_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", id="1", classes=["a"], requester_hash="Ada Lovelace")
    with pytest.raises(ConfigError, match=r"requester_hash: expected 64 hex digits.*12 characters") as caught:
        read_request(path)
    assert "Ada" not in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"id": "1", "classes": ["a"], "classes": ["b"]}')
    with pytest.raises(ConfigError, match="a key stands twice"):
        read_request(path)


def test_two_files_may_not_share_an_id(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.json", id="12"[i == 2], classes=["a"]) for i in range(3)]
    assert [request.id for request in read_requests(paths[1:])] == ["1", "2"]
    with pytest.raises(ConfigError, match=r"1.json: id: '1' is that of .*0.json too"):
        read_requests(paths)


def test_hashes_by_hand() -> None:
    expected = hmac.new(bytes.fromhex(SALT), b"class a", hashlib.sha256).hexdigest()
    assert fingerprint(SALT, "class a") == expected and class_prints(REQUEST) == (expected,)
    with pytest.raises(ConfigError, match="salt: expected at least 32 hex digits"):
        fingerprint("", "a")


@given(st.permutations(["a", "b", "c"]))
def test_the_hash_of_a_request_does_not_hang_on_order(classes: list[str]) -> None:
    request = replace(REQUEST, classes=tuple(classes))
    assert request_hash(request) == request_hash(replace(REQUEST, classes=("a", "b", "c")))
    assert class_prints(request) == class_prints(replace(REQUEST, classes=("a", "b", "c")))


@pytest.mark.parametrize(
    "change",
    [
        {"id": "r2"},
        {"classes": ("b",)},
        {"samples": ("0" * 16,)},
        {"reason": "x"},
        {"legal_basis": "x"},
        {"requester_hash": "0" * 64},
        {"deadline": "2026-01-01"},
        {"shots": 1},
        {"salt": "1f" * 16},
    ],
)
def test_the_hash_of_a_request_hangs_on_every_field(change: dict[str, Any]) -> None:
    assert request_hash(replace(REQUEST, **change)) != request_hash(REQUEST)


def test_the_manifest_is_of_a_set_and_salted() -> None:
    assert manifest_hash(SALT, ["a", "b"]) == manifest_hash(SALT, ["b", "a"]) != manifest_hash(SALT, ["a"])
    assert manifest_hash(SALT, ["a"]) != manifest_hash("1f" * 16, ["a"])


def test_a_salt_is_drawn_once() -> None:
    drawn = with_salt(replace(REQUEST, salt=""))
    assert len(drawn.salt) == 32 and drawn.salt != with_salt(replace(REQUEST, salt="")).salt
    assert with_salt(drawn) is drawn


def test_classes_and_samples_are_found() -> None:
    targets = resolve(REQUEST, DATA)
    assert (targets.classes, targets.forget) == ((0,), (0, 1))
    assert (targets.retained, targets.retain) == ((1, 2, 3, 4), (2, 3, 4, 5, 6))
    single = resolve(ForgetRequest(id="r", samples=(DATA.hashes[4], DATA.hashes[2])), DATA)
    assert (single.classes, single.forget, single.retain) == ((), (2, 4), (0, 1, 3, 5, 6))
    assert single.retained == (0, 1, 2, 3, 4)
    both = resolve(replace(REQUEST, samples=(DATA.hashes[0], DATA.hashes[6])), DATA)
    assert (both.forget, both.retained) == ((0, 1, 6), (1, 2, 3, 4))


def test_every_copy_of_an_image_is_forgotten() -> None:
    twice = replace(DATA, hashes=(*DATA.hashes[:6], DATA.hashes[2]))
    targets = resolve(ForgetRequest(id="r", samples=(DATA.hashes[2],)), twice)
    assert targets.forget == (2, 6)


def test_earlier_requests_are_neither_forgotten_nor_retained() -> None:
    earlier = (ForgetRequest(id="r0", classes=("b",)), ForgetRequest(id="s", samples=(DATA.hashes[4],)))
    targets = resolve(REQUEST, DATA, earlier)
    assert (targets.forget, targets.retain, targets.retained) == ((0, 1), (5, 6), (2, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("aa",)}, "request 'r1': classes: no class 'aa' among 5. Nearest is 'a'"),
        ({"classes": ("z",)}, "no class 'z' among 5. Known: 'a', 'b', 'c', 'd', 'e'."),
        ({"classes": ("e",)}, "no image of class 'e' among 7"),
        ({"samples": ("f" * 16,)}, "samples: no image with hash 'ffffffffffffffff' among 7"),
        ({"classes": ("a", "b", "c", "d")}, "nothing is left to retain of 7 images"),
    ],
)
def test_what_is_not_in_the_data_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve(replace(REQUEST, **change), DATA)


def test_long_lists_are_cut() -> None:
    many = images([0] * 12, "abcdefgh")
    with pytest.raises(DataError, match="no image of class 'b', 'c', 'd', 'e', 'f' and 2 more among 12"):
        resolve(ForgetRequest(id="r", classes=tuple("bcdefgh")), many)


@pytest.mark.parametrize(
    ("request_", "earlier", "what"),
    [
        (REQUEST, {"classes": ("b", "a")}, "class 'a'"),
        (ForgetRequest(id="r", samples=(DATA.hashes[0],)), {"classes": ("a",)}, f"image {DATA.hashes[0]}"),
        (ForgetRequest(id="r", samples=(DATA.hashes[0],)), {"samples": (DATA.hashes[0],)}, f"image {DATA.hashes[0]}"),
    ],
)
def test_what_was_forgotten_before_is_refused_by_name(
    request_: ForgetRequest, earlier: dict[str, Any], what: str
) -> None:
    other = ForgetRequest(id="r0", **earlier)
    assert [(each.request, each.what) for each in overlaps(request_, DATA, [other])] == [("r0", what)]
    with pytest.raises(DataError, match=f"{what} was asked for by request 'r0' already"):
        resolve(request_, DATA, [other])


def test_a_class_may_follow_its_images() -> None:
    assert resolve(REQUEST, DATA, [ForgetRequest(id="r0", samples=(DATA.hashes[0],))]).forget == (0, 1)


def test_a_missing_file_is_called_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: expected a request, a TOML or JSON file"):
        read_request(tmp_path / "nowhere.json")
