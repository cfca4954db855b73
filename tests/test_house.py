"""The rules of the house that a reader would otherwise have to check by eye."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "workers", "merge_service", "cluster")
ALLOWED_ROOMS = {
    "pipeline": {"pipeline", "workers", "merge_service", "cluster"},
    "workers": {"workers", "merge_service"},
    "merge_service": {"merge_service"},
    "cluster": {"cluster"},
}
SAID = (("pipeline", "report"), ("pipeline", "claims"))
"""Where results are told to people."""
HEAVY = {
    "ray": lambda path: path.parts[0] == "cluster" or path.name == "actors.py",
    "mlflow": lambda path: path.parts[0] == "pipeline" and path.stem.startswith("tracking"),
    "deepspeed": lambda path: path.parts[0] == "workers" and path.stem.startswith("engine"),
    "webdataset": lambda path: path.parts[:2] == ("workers", "data"),
    "pandas": lambda path: path.parts[:2] in SAID or path.parts == ("pipeline", "api.py"),
    "altair": lambda path: path.parts[:2] in SAID,
}
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 70, 6
OPTIONS = {"threads", "block", "measure", "device", "split"}
"""Parameters that are options of the command line and bear on no result: they do not count."""
MANY_PARAMETERS = (
    "merge_service/merge.py",
    "merge_service/techniques/own.py",
    "merge_service/blocks/kernels.py",
)
"""The functions that people call, which build values of what they are given, and compiled loops, which cannot take values."""
ORDER = {
    "merge_service": (
        "errors faults", "files", "checkpoints", "anatomy blocks", "techniques", "timelines engine", "merging",
        "merge report similarity", "service",
    ),
}  # fmt: skip
"""By room its folders, and modules beside them, in groups: each imports itself and what stands in groups before its own."""
CIRCLES = (
    "pipeline.api pipeline.state_dicts",
    "pipeline.plan_file pipeline.steps",
    "workers.engine workers.engine_deepspeed",
)
"""Circles of imports that are still there, to be struck off."""


def modules() -> list[Path]:
    return sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_module_imports_only_what_its_room_may(path: Path) -> None:
    for name in imports(path):
        if name in ROOMS:
            assert name in ALLOWED_ROOMS[path.parts[0]], f"{path} imports room {name}"
        if name in HEAVY:
            assert HEAVY[name](path), f"{path} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=str)
def test_module_is_short_and_says_why_it_exists(path: Path) -> None:
    source = (ROOT / path).read_text()
    assert len(source.splitlines()) <= MAX_LINES
    tree = ast.parse(source)
    if tree.body:
        assert ast.get_docstring(tree), f"{path} does not say why it exists"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", [path for path in modules() if path.parts[0] in ORDER], ids=str)
def test_function_takes_few_parameters(path: Path) -> None:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and str(path) not in MANY_PARAMETERS:
            given = {one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            count = len(given - OPTIONS - {"self", "cls"})
            assert count <= MAX_PARAMETERS, f"{path}: {node.name} has {count} parameters"


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """What a module of ours imports from modules of ours, wherever in its text: the other module's name, and the name in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] in ROOMS)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOMS:
            yield from ((node.module, alias.name) for alias in node.names)


def used(path: Path) -> set[str]:
    """The modules of ours that a module imports."""
    inner = {(module, f"{module}.{name}") for module, name in imported(path)}
    return {full if is_module(full) else module for module, full in inner}


def is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [path for path in modules() if path.parts[0] in ORDER], ids=str)
def test_folder_imports_only_folders_before_it(path: Path) -> None:
    room, *rest = name_of(path).split(".")
    level = {name: number for number, group in enumerate(ORDER[room]) for name in group.split()}
    for module in used(path):
        if rest and module.startswith(f"{room}.") and module.split(".")[1] != rest[0]:
            assert level[module.split(".")[1]] < level[rest[0]], f"{path} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=str)
def test_other_rooms_import_only_names_that_a_folder_lists(path: Path) -> None:
    for module, name in imported(path):
        room, *rest = module.split(".")
        if room in ORDER and room != path.parts[0] and rest and (ROOT / room / rest[0]).is_dir():
            listed = importlib.import_module(f"{room}.{rest[0]}").__all__
            assert len(rest) == 1 and name in listed, f"{path} imports {module} {name}"


def test_modules_import_each_other_in_no_circle() -> None:
    edges = {name_of(path): used(path) for path in modules()}
    found = {" ".join(sorted(circle)) for name in edges if len(circle := _circle(name, edges)) > 1}
    assert found == set(CIRCLES)


def _circle(name: str, edges: dict[str, set[str]]) -> set[str]:
    """The modules that a module leads to and that lead back to it."""
    return {name} | {other for other in _reached(name, edges) if name in _reached(other, edges)}


def _reached(name: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [name]
    while ahead:
        new = edges.get(ahead.pop(), set()) - found
        found |= new
        ahead += new
    return found


def test_command_line_import_loads_no_heavy_library() -> None:
    code = "import sys, pipeline.cli; print([m for m in ('torch', 'ray', 'mlflow', 'deepspeed', 'open_clip', 'fsspec') if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_merge_path_import_loads_no_torch() -> None:
    code = "import sys, merge_service.merge; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


def test_nothing_outside_tests_unpickles_or_loads_yaml_unsafely() -> None:
    for path in modules():
        source = (ROOT / path).read_text()
        for call in ("torch.load(", "yaml.load(", "pickle.load(", "pickle.loads("):
            assert call not in source, f"{path} calls {call}"
