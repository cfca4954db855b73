"""The rules of the house that a reader would otherwise have to check by eye."""

import ast
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
MAX_LINES, MAX_FUNCTION_LINES = 450, 70


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
