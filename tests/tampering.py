"""Ways to change a JSON value in one place, for tests of what must be noticed."""

import copy
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[Path]:
    """List the places of all values that are no list or object, and of empty lists and objects."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    if not inner:
        yield path
    for key, each in inner:
        yield from leaves(each, (*path, key))


def keys(value: Any, path: Path = ()) -> Iterator[Path]:
    """List the places of all keys and items, at every depth."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, each in inner:
        yield (*path, key)
        yield from keys(each, (*path, key))


def changed(value: Any, path: Path) -> Any:
    """Copy the value with another one, of the same type, in one place."""
    return _put(value, path, _other)


def without(value: Any, path: Path) -> Any:
    """Copy the value without one key or item."""
    result = copy.deepcopy(value)
    del _at(result, path[:-1])[path[-1]]
    return result


def name(path: Path) -> str:
    """Write a place for a test's id."""
    return ".".join(map(str, path))


def _put(value: Any, path: Path, make: Any) -> Any:
    result = copy.deepcopy(value)
    holder = _at(result, path[:-1])
    holder[path[-1]] = make(holder[path[-1]])
    return result


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value[:-1] + ("0" if value[-1:] != "0" else "1")
        case list():
            return ["0"]
        case dict():
            return {"extra": 0.0}
        case _:
            return 1.0
