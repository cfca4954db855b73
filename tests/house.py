"""The source of the rooms for the tests of their structure: modules, imports, signatures, circles.

Invariant: an import counts wherever it is, also inside a function and under `TYPE_CHECKING`.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "workers", "merge_service", "cluster")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> tuple[Path, ...]:
    """Every module of every room, relative to the repository."""
    return tuple(sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")))


@cache
def source(path: Path) -> str:
    return (ROOT / path).read_text()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(source(path))


@cache
def by_name() -> dict[str, Path]:
    """Modules by their dotted names; a package by its own name."""
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in modules()}


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of a module's imports: modules of the rooms in full, others as far as the statement names them."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, f"{path} imports by relative name"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & by_name().keys()
            if not whole <= by_name().keys():
                found.add(node.module)
    return frozenset(found)


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """Names that a module imports from modules of the rooms: the other module's dotted name, and the name in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOMS:
            yield from ((node.module, alias.name) for alias in node.names)


def imported_modules(path: Path) -> set[Path]:
    """The modules of the rooms that a module imports."""
    return {by_name()[name] for name in imports(path) if name in by_name()} - {path}


def part(path: Path) -> str:
    """The folder below its room that a module is in, or the module itself if it is directly in the room."""
    return path.parts[1] if len(path.parts) > 2 else path.stem


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Every function and method with its qualified name."""

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, Function | ast.ClassDef):
                yield from below(child, prefix)
                continue
            if isinstance(child, Function):
                yield prefix + child.name, child
            inside = ".<locals>" if isinstance(child, Function) else ""
            yield from below(child, f"{prefix}{child.name}{inside}.")

    return below(tree(path), "")


def parameters(function: Function) -> list[ast.arg]:
    """The parameters that callers pass; `self` and `cls` do not count."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [one for one in named if one is not None and one.arg not in ("self", "cls")]


def is_public(name: str) -> bool:
    return not any(word.startswith(("_", "<")) and word != "__init__" for word in name.split("."))


def says_any(function: Function) -> bool:
    """Whether the signature of a function has `Any` anywhere."""
    said = [one.annotation for one in parameters(function)] + [function.returns]
    return any(
        isinstance(node, ast.Name) and node.id == "Any" for one in said if one for node in ast.walk(one)
    )


def circles(graph: Mapping[Path, set[Path]]) -> list[list[str]]:
    """Sets of modules that import each other in a circle (Tarjan's strongly connected components)."""
    number: dict[Path, int] = {}
    lowest: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[str]] = []

    def visit(one: Path) -> None:
        number[one] = lowest[one] = len(number)
        stack.append(one)
        for other in graph[one]:
            if other not in number:
                visit(other)
            if other in stack:
                lowest[one] = min(lowest[one], lowest[other])
        if lowest[one] == number[one]:
            members = stack[stack.index(one) :]
            del stack[stack.index(one) :]
            if len(members) > 1:
                found.append(sorted(map(str, members)))

    for one in graph:
        if one not in number:
            visit(one)
    return sorted(found)
