"""Signatures of files, Ed25519: who holds the key has written them, and nobody has changed them since.

A signature is 64 bytes beside its file, name and ".sig", which other tools read too:

    openssl pkeyutl -verify -pubin -inkey key.pem -rawin -in 2041.json -sigfile 2041.json.sig

The private key is a PEM file that the caller names, or else what the environment variable POSTGRAD_SIGNING_KEY holds:
the path of such a file, or its text. It is never shown or logged.
"""

import os
from pathlib import Path
from typing import Any

from postgrad.core.files import atomic_path
from postgrad.errors import ArtefactError, ConfigError

VARIABLE = "POSTGRAD_SIGNING_KEY"
NUM_BYTES = 64
_INSTALL = "Signatures need the package cryptography: python -m pip install cryptography"


def sign_file(path: Path, key: str = "") -> Path:
    """Sign a file as it is now; give the path of the signature.

    Args:    key: path of the private key's PEM file; "" = POSTGRAD_SIGNING_KEY.
    Raises:  ConfigError: no key, not an Ed25519 key, or cryptography is not installed.
    """
    signature = _private_key(key).sign(path.read_bytes())
    place = signature_path(path)
    with atomic_path(place) as temporary:
        temporary.write_bytes(signature)
    return place


def verify_file(path: Path, public_key: Path) -> None:
    """Check a file against the signature beside it.

    Args:    public_key: PEM file, come by a way that the file's writer does not control.
    Raises:  ConfigError: the key cannot be used.  ArtefactError: no signature, or not that of this file and key.
    """
    key = _public_key(public_key)
    from cryptography.exceptions import InvalidSignature

    place = signature_path(path)
    if not path.is_file() or not place.is_file():
        missing = path if not path.is_file() else place
        raise ArtefactError(f"{missing}: expected a file and its signature, found none. Restore it, or sign anew.")
    signature = place.read_bytes()
    try:
        key.verify(signature, path.read_bytes())
    except InvalidSignature:
        size = "" if len(signature) == NUM_BYTES else f" It has {len(signature)} bytes, not {NUM_BYTES}."
        raise ArtefactError(
            f"{place}: not a signature of {path.name} by the key {public_key.name}: file, signature or key is another."
            f"{size} Do not rely on the file."
        ) from None


def signature_path(path: Path) -> Path:
    """Name the signature of a file."""
    return path.with_name(f"{path.name}.sig")


def make_key(path: Path) -> Path:
    """Write a new private key that only its owner can read, and the public one as `<path>.pub`; give the latter.

    Raises:  ConfigError: there is a key already, or cryptography is not installed.
    """
    try:
        from cryptography.hazmat.primitives import serialization as forms
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    private = Ed25519PrivateKey.generate()
    text = private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(
            f"{path}: there is a file already; a key is not written over. Choose another name."
        ) from error
    with os.fdopen(handle, "wb") as file:
        file.write(text)
    public = path.with_name(f"{path.name}.pub")
    with atomic_path(public) as temporary:
        temporary.write_bytes(
            private.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
        )
    return public


def _private_key(key: str) -> Any:
    """Read the private key from where the caller or the environment says."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    given = key or os.environ.get(VARIABLE, "")
    if not given:
        raise ConfigError(f"expected a key to sign with, found none. Give a PEM file, or set {VARIABLE}.")
    is_text = given.lstrip().startswith("-----BEGIN")
    # What is not plainly a path may be a key: it is not repeated.
    where = VARIABLE if not key else "the key given" if is_text else key
    data = given.encode() if is_text else _read(Path(given), where)
    try:
        loaded = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Nor is the cause shown, which may quote a part of it.
        raise ConfigError(
            f"{where}: expected an Ed25519 private key in PEM, without a password. Make one with `make_key`, or: "
            "openssl genpkey -algorithm ed25519"
        ) from None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise ConfigError(f"{where}: expected an Ed25519 private key, found one of another kind.")
    return loaded


def _public_key(path: Path) -> Any:
    """Read a public key."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    data = _read(path, str(path))
    try:
        loaded = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path}: expected an Ed25519 public key in PEM. Make it with: openssl pkey -pubout"
        ) from None
    if not isinstance(loaded, Ed25519PublicKey):
        raise ConfigError(f"{path}: expected an Ed25519 public key, found one of another kind.")
    return loaded


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}: expected a key in PEM there; {error.strerror}.") from None
