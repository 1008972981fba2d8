"""The design's budgets and rules, checked on the source itself."""

import ast
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from postgrad.methods import METHODS, config_class, method

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src"
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_NESTING, MAX_OWN_FIELDS = 400, 60, 8, 3, 12
NESTED = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file, its dotted name, its lines and its tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module


def read(path: Path) -> Module:
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts) if path.is_relative_to(SOURCE) else path.stem
    text = path.read_text(encoding="utf-8")
    return Module(name.removesuffix(".__init__"), path, text, ast.parse(text))


PACKAGE = [read(path) for path in sorted((SOURCE / "postgrad").rglob("*.py"))]
BESIDE = [read(path) for path in sorted((REPOSITORY / "benchmarks").rglob("*.py"))]
TESTS = [read(path) for path in sorted((REPOSITORY / "tests").rglob("*.py"))]
every_module = pytest.mark.parametrize("module", PACKAGE, ids=lambda module: module.name)
every_method = pytest.mark.parametrize("name", METHODS)


def functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def at(module: Module, node: ast.AST) -> str:
    return f"{module.path.relative_to(REPOSITORY)}:{vars(node).get('lineno', 1)}"


def length(function: Function) -> int:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    assert function.end_lineno is not None
    return function.end_lineno - first + 1


def parameters(function: Function) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + (arguments.vararg is not None)


def depth(statements: list[ast.stmt], level: int = 0) -> int:
    """Count blocks within blocks; `elif` stays on its `if`'s level, an inner function starts anew."""
    deepest = level
    for statement in statements:
        if isinstance(statement, NESTED):
            deepest = max(deepest, *(depth(body, level + 1) for body in bodies(statement)))
    return deepest


def bodies(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    blocks = vars(statement)
    yield blocks.get("body", [])
    orelse = blocks.get("orelse", [])
    if len(orelse) == 1 and isinstance(statement, ast.If) and isinstance(orelse[0], ast.If):
        yield from bodies(orelse[0])
    else:
        yield orelse
    yield blocks.get("finalbody", [])
    for part in (*blocks.get("handlers", []), *blocks.get("cases", [])):
        yield part.body


def passes_through(function: Function) -> bool:
    """Say whether **name is taken and handed on as **name; taking it alone is what some interfaces ask."""
    keywords = [keyword for node in ast.walk(function) if isinstance(node, ast.Call) for keyword in node.keywords]
    handed_on = [ast.unparse(keyword.value) for keyword in keywords if keyword.arg is None]
    return function.args.kwarg is not None and function.args.kwarg.arg in handed_on


@pytest.mark.parametrize("module", [*PACKAGE, *BESIDE, *TESTS], ids=lambda module: str(module.path.name))
def test_files_and_functions_stay_short(module: Module) -> None:
    lines = len(module.text.splitlines())
    assert lines <= MAX_FILE, f"{module.path} has {lines} lines; at most {MAX_FILE}"
    for function in functions(module.tree):
        assert length(function) <= MAX_FUNCTION, f"{at(module, function)} {function.name}: {length(function)} lines"


@every_module
def test_functions_stay_simple(module: Module) -> None:
    for function in functions(module.tree):
        where = f"{at(module, function)} {function.name}"
        assert parameters(function) <= MAX_PARAMETERS, f"{where}: {parameters(function)} parameters"
        assert depth(function.body) <= MAX_NESTING, f"{where}: nested {depth(function.body)} deep"
        assert not passes_through(function), f"{where}: hands its ** on; name the parameters"


@every_module
def test_nothing_is_probed_for(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("getattr", "hasattr"), f"{at(module, node)}: {node.func.id}; say what it is"


def imports(module: Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield each module of ours that is imported anywhere in the file, lazily or only for types included."""
    names = {other.name for other in PACKAGE}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names if alias.name in names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{at(module, node)}: write imports in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in names or node.module in names:
                    yield (full if full in names else str(node.module)), node


def layer(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else "top" if parts[-1] in ("methods", "__main__") else "root"


def allowed(importer: str, imported: str) -> bool:
    below = {"root": {"root"}, "core": {"root", "core"}, "fp8": {"root", "core", "fp8"}}
    if importer == "top":
        return imported in ("root", "core", "top")
    return imported in below.get(importer, {"root", "core", "fp8", importer})


@every_module
def test_imports_point_down(module: Module) -> None:
    for name, node in imports(module):
        assert allowed(layer(module.name), layer(name)), f"{at(module, node)}: {module.name} may not import {name}"


def test_there_is_no_import_cycle() -> None:
    graph = {module.name: sorted({name for name, _ in imports(module)} - {"postgrad"}) for module in PACKAGE}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_init_files_are_empty() -> None:
    for module in PACKAGE:
        if module.path.name == "__init__.py" and module.name != "postgrad":
            assert module.text == "", f"{module.path} must be empty"
    root = next(module for module in PACKAGE if module.name == "postgrad")
    _, *rest = root.tree.body
    assert ast.unparse(rest).startswith("__version__ = ") and len(rest) == 1, "the root holds the version only"


def public(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


@every_module
def test_what_is_public_is_documented(module: Module) -> None:
    if module.text:
        assert ast.get_docstring(module.tree), f"{module.path} lacks a docstring"
    for node in public(module.tree.body):
        assert ast.get_docstring(node), f"{at(module, node)}: {node.name} lacks a docstring"


def configs(module: Module) -> Iterator[ast.ClassDef]:
    for node in module.tree.body:
        if (
            isinstance(node, ast.ClassDef)
            and node.name.endswith("Config")
            and "Protocol" not in map(ast.unparse, node.bases)
        ):
            yield node


@every_module
def test_settings_are_few_and_each_is_explained(module: Module) -> None:
    for node in configs(module):
        own = 0
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                assert told, f"{at(module, field)}: write a string under the setting {ast.unparse(field.target)}"
                own += 1
        assert own <= MAX_OWN_FIELDS, f"{at(module, node)}: {node.name} has {own} settings of its own"


@every_module
def test_configs_are_frozen_and_by_keyword(module: Module) -> None:
    for node in configs(module):
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        assert decorators == ["dataclass(frozen=True, kw_only=True)"], f"{at(module, node)}: {decorators}"


@every_method
def test_the_name_is_the_address(name: str) -> None:
    assert METHODS[name].rpartition(".")[2] == name
    attributes = vars(method(name))
    assert config_class(name).__module__ == METHODS[name]
    for required in ("check", "plan", "run"):
        assert callable(attributes[required]), f"{METHODS[name]} needs a function {required}"
    has_loss = f"{name}_loss" in attributes or ("LOSS" in attributes and attributes["LOSS"] is None)
    assert has_loss, f"{METHODS[name]} needs a function {name}_loss, or LOSS = None"


@every_method
def test_a_method_has_its_page_and_its_tests(name: str) -> None:
    capability = METHODS[name].split(".")[1]
    for path in (f"docs/methods/{name}.md", f"tests/{capability}/test_{name}.py"):
        assert (REPOSITORY / path).is_file(), f"{path} is missing"


def test_options_change_only_on_purpose() -> None:
    frozen = (REPOSITORY / "tests" / "options.txt").read_text(encoding="utf-8")
    options = runpy.run_path(str(REPOSITORY / "scripts" / "options"))["options"]()
    assert options == frozen, "settings changed; if that is meant, run: python scripts/options"


@pytest.mark.parametrize("module", PACKAGE, ids=lambda module: module.name)
def test_every_module_imports(module: Module) -> None:
    import_module(module.name)
