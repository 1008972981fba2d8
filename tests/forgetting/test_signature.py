"""Signatures: theirs and no other's, readable by other tools, and a key that is never shown."""

import builtins
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postgrad.errors import ArtefactError, ConfigError
from postgrad.forgetting.signature import VARIABLE, make_key, sign_file, signature_path, verify_file


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("cryptography")
    monkeypatch.delenv(VARIABLE, raising=False)
    make_key(tmp_path / "key.pem")
    return tmp_path / "key.pem"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "2041.json"
    path.write_bytes(b'{"a": 1}\n')
    return path


def public(key: Path) -> Path:
    return key.with_name("key.pem.pub")


def test_a_signature_is_of_one_file_and_key(key: Path, file: Path, tmp_path: Path) -> None:
    place = sign_file(file, str(key))
    assert place == signature_path(file) == tmp_path / "2041.json.sig" and len(place.read_bytes()) == 64
    verify_file(file, public(key))
    before = place.read_bytes()
    assert sign_file(file, str(key)).read_bytes() == before, "Ed25519 has no randomness"
    other = make_key(tmp_path / "other.pem")
    with pytest.raises(ArtefactError, match=r"2041.json.sig: not a signature of 2041.json by the key other.pem.pub"):
        verify_file(file, other)


def test_any_bit_changed_is_found(key: Path, file: Path) -> None:
    place = sign_file(file, str(key))
    for path in (file, place):
        data = path.read_bytes()
        for index in range(len(data)):
            path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
            with pytest.raises(ArtefactError, match="not a signature of"):
                verify_file(file, public(key))
        path.write_bytes(data)
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="It has 63 bytes, not 64"):
        verify_file(file, public(key))


def test_what_is_missing_is_named(key: Path, file: Path) -> None:
    with pytest.raises(ArtefactError, match=r"2041.json.sig: expected a file and its signature"):
        verify_file(file, public(key))
    sign_file(file, str(key))
    file.unlink()
    with pytest.raises(ArtefactError, match=r"2041.json: expected a file and its signature"):
        verify_file(file, public(key))


def test_the_key_may_come_from_the_environment(key: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"expected a key to sign with, found none.*{VARIABLE}"):
        sign_file(file)
    for value in (str(key), key.read_text()):
        monkeypatch.setenv(VARIABLE, value)
        sign_file(file)
        verify_file(file, public(key))


def test_a_key_is_its_owners_alone_and_not_written_over(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and "PRIVATE" in key.read_text()
    assert "PUBLIC" in public(key).read_text()
    with pytest.raises(ConfigError, match="a key is not written over"):
        make_key(key)


def elliptic(folder: Path) -> str:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    private = generate_private_key(SECP256R1())
    text = private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    pem = private.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    (folder / "ec.pub").write_bytes(pem)
    return text.decode()


def locked(folder: Path) -> str:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    shut = forms.BestAvailableEncryption(b"password")
    return Ed25519PrivateKey.generate().private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, shut).decode()


def nonsense(folder: Path) -> str:
    return "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nonsense, "expected an Ed25519 private key in PEM, without a password"),
        (elliptic, "found one of another kind"),
        (locked, "expected an Ed25519 private key in PEM, without a password"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_a_bad_key_is_refused_and_not_shown(
    key: Path, file: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], str], message: str, given: bool
) -> None:
    text = make(key.parent)
    monkeypatch.setenv(VARIABLE, "" if given else text)
    with pytest.raises(ConfigError, match=message) as caught:
        sign_file(file, text if given else "")
    assert str(caught.value).startswith("the key given" if given else VARIABLE)
    assert text.splitlines()[1] not in str(caught.value)


def test_a_key_that_is_not_there_is_named_by_its_path_if_that_was_given(
    key: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(key.with_name("missing.pem"))
    with pytest.raises(ConfigError, match=r"missing.pem: expected a key in PEM there; No such file"):
        sign_file(file, missing)
    monkeypatch.setenv(VARIABLE, "c2VjcmV0")
    with pytest.raises(ConfigError, match=f"{VARIABLE}: expected a key in PEM there; No such file") as caught:
        sign_file(file)
    assert "c2VjcmV0" not in str(caught.value)


def test_a_bad_public_key_is_refused(key: Path, file: Path) -> None:
    sign_file(file, str(key))
    elliptic(key.parent)
    for path, message in (
        (key, "expected an Ed25519 public key in PEM"),
        (key.with_name("ec.pub"), "found one of another kind"),
        (key.with_name("none"), "No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            verify_file(file, path)


def test_openssl_agrees(key: Path, file: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    place = sign_file(file, str(key))
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public(key)), "-rawin"]
    done = subprocess.run(
        [*check, "-in", str(file), "-sigfile", str(place)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key.with_name("o.pem"))],
        check=True,
        capture_output=True,
    )
    sign_file(file, str(key.with_name("o.pem")))
    with pytest.raises(ArtefactError, match="not a signature"):
        verify_file(file, public(key))


def test_without_the_package_it_says_how_to_install_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    for call in (lambda: sign_file(file, "k"), lambda: verify_file(file, file), lambda: make_key(file)):
        with pytest.raises(ConfigError, match="python -m pip install cryptography"):
            call()
