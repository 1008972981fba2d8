"""The only registry: method name -> module that holds it."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from postgrad.core.config import nearest
from postgrad.errors import ConfigError

METHODS: dict[str, str] = {
    "align": "postgrad.alignment.align",
    "sft": "postgrad.alignment.sft",
    "annotate": "postgrad.alignment.annotate",
    "reward": "postgrad.alignment.reward",
    "sample": "postgrad.alignment.sample",
    "rejection": "postgrad.alignment.rejection",
    "dpo": "postgrad.alignment.dpo",
    "evaluate": "postgrad.alignment.evaluate",
    "forget": "postgrad.forgetting.forget",
    "unlearn": "postgrad.forgetting.unlearn",
    "verify": "postgrad.forgetting.verify",
    "revoke": "postgrad.forgetting.revoke",
    "bake": "postgrad.forgetting.bake",
    "forget_boxes": "postgrad.forgetting.forget_boxes",
    "purge": "postgrad.forgetting.purge",
    "pretrain": "postgrad.fp8.pretrain",
    "parity": "postgrad.fp8.parity",
}


def method(name: str) -> ModuleType:
    """Import a method's module: it has `check(config)`, `plan(config)` and `run(config)`.

    Raises:  ConfigError: no such method; names the nearest.
    """
    if name not in METHODS:
        guess = nearest(name, METHODS)
        hint = f"; nearest is '{guess}'" if guess else ""
        raise ConfigError(f"Unknown method '{name}'{hint}. Methods: {', '.join(METHODS)}.")
    return import_module(METHODS[name])


def config_class(name: str) -> type[Any]:
    """Find the config class of a method: `<Name>Config` in its module."""
    module = method(name)
    for attribute, value in vars(module).items():
        if attribute.lower() == f"{name.replace('_', '')}config" and isinstance(value, type):
            return value
    raise AssertionError(f"{module.__name__} must define a class {name.capitalize()}Config")


def summary(name: str) -> str:
    """Read the first line of a method's docstring without importing it, which would take seconds."""
    spec = find_spec(METHODS[name])
    assert spec is not None and spec.origin is not None, f"{METHODS[name]}, listed in METHODS, does not exist"
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
