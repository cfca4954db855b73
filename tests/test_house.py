"""The rules of the house that a reader would otherwise have to check by eye.

Known exceptions are in `tests/house_known.py`; an exception that no longer holds must be removed there.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests import house, house_known

ALLOWED_ROOMS = {
    "pipeline": {"pipeline", "workers", "merge_service", "cluster"},
    "workers": {"workers", "merge_service"},
    "merge_service": {"merge_service"},
    "cluster": {"cluster"},
}
FLOORS: dict[str, tuple[set[str], ...]] = {
    "workers": (
        {"jobs"},
        {"data"},
        {"feed"},
        {"models"},
        {"training", "scoring"},
        {"evidence", "serving"},
        {"learning"},
        {"actors", "pretrain"},
    ),
    "cluster": (),
    "merge_service": (
        {"errors", "faults", "moved"},
        {"files", "kinds"},
        {"checkpoints"},
        {"anatomy", "blocks", "statistics"},
        {"techniques"},
        {"timelines", "engine"},
        {"merging", "live"},
        {"merge", "report", "similarity", "trajectories"},
        {"service"},
    ),
    "pipeline": (
        {"errors", "identity", "console"},
        {"files", "kinds", "signals"},
        {"study", "store"},
        {"plan"},
        {"results"},
        {"workspace"},
        {"tracking"},
        {"run"},
        {"report", "search", "service"},
        {"claims", "merging"},
        {"recipes"},
        {"cli", "api"},
    ),
}
"""The order of folders (and of modules directly in a room): each imports only from floors below its own."""
OPTIONS = {"threads", "block", "measure", "device", "split"}
"""Parameters that are options of the command line and affect no result; they do not count."""
MANY_PARAMETERS = (
    "merge_service/merge.py",
    "merge_service/techniques/own.py",
    "merge_service/blocks/kernels.py",
    "merge_service/blocks/counting.py",
    "merge_service/blocks/reading.py",
)
"""Public functions, which build values from their arguments, and compiled loops, which cannot take values."""
DIRECTLY = {"workers": {"jobs", "actors"}, "pipeline": {"errors", "identity", "console", "signals", "api"}}
"""The modules that may be directly in a room that has folders."""
SAID = (("pipeline", "report"), ("pipeline", "claims"))
"""Where results become tables, figures and pages."""
HEAVY = {
    "ray": lambda path: path.parts[0] == "cluster" or path.name == "actors.py",
    "mlflow": lambda path: (
        path.parts[:3] == ("pipeline", "tracking", "mlflow") or path.name == "zero_shot.py"
    ),
    "deepspeed": lambda path: path.parts[:3] == ("workers", "training", "engines"),
    "torch": lambda path: path.parts[0] == "workers" or path.name in ("device.py", "state_dicts.py"),
    "webdataset": lambda path: path.parts[:2] == ("workers", "data"),
    "pandas": lambda path: path.parts[:2] in SAID or path.name in ("api.py", "zero_shot.py"),
    "altair": lambda path: path.parts[:2] in SAID,
    **{
        name: lambda path: (
            path.parts[:2] == ("pipeline", "service") or path.parts[1:3] == ("tracking", "mlflow")
        )
        for name in ("fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart")
    },
}
CORE = (
    "pipeline/plan",
    "pipeline/store",
    "pipeline/run",
    "pipeline/workspace",
    "workers/training",
    "workers/scoring",
)
"""Where values have types: no public signature says `Any`."""
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_MODULES = 450, 70, 6, 15
PERSONIFIED = re.compile(r"\b(?:told|knocks|farewell|dies|deaf|hears|believes)\b", re.IGNORECASE)
"""Words for people. Software is passed values, ends, and reads; a module opening says so."""


def test_modules_import_only_what_their_rooms_may() -> None:
    wrong = [
        f"{path} imports {name}"
        for path in house.modules()
        for name in sorted({found.split(".")[0] for found in house.imports(path)})
        if (name in house.ROOMS and name not in ALLOWED_ROOMS[path.parts[0]])
        or (name in HEAVY and not HEAVY[name](path))
    ]
    assert not wrong


def test_modules_import_only_from_floors_below_their_own() -> None:
    floors = {
        (room, part): floor
        for room, all_floors in FLOORS.items()
        for floor, parts in enumerate(all_floors)
        for part in parts
    }
    wrong = [
        f"{path} imports {other}"
        for path in house.modules()
        for other in sorted(house.imported_modules(path))
        for mine, below in [[(one.parts[0], house.part(one)) for one in (path, other)]]
        if mine != below and mine[0] == below[0] and {mine, below} <= floors.keys()
        and floors[below] >= floors[mine]
    ]  # fmt: skip
    assert not wrong


def test_other_rooms_import_only_names_that_a_folder_of_merging_lists() -> None:
    """The folders of `merge_service` list their public names; the other rooms do not yet."""
    wrong = [
        f"{path} imports {module} {name}"
        for path in house.modules()
        for module, name in house.imported_names(path)
        for room, *rest in [module.split(".")]
        if room == "merge_service" != path.parts[0] and rest and (house.ROOT / room / rest[0]).is_dir()
        if len(rest) != 1 or name not in importlib.import_module(f"{room}.{rest[0]}").__all__
    ]
    assert not wrong


@pytest.mark.parametrize("room", FLOORS)
def test_no_module_leads_back_to_itself(room: str) -> None:
    graph = {path: house.imported_modules(path) for path in house.modules() if path.parts[0] == room}
    inside = {path: {other for other in others if other in graph} for path, others in graph.items()}
    assert house.circles(inside) == house_known.CIRCLES.get(room, [])


@pytest.mark.parametrize("room", DIRECTLY)
def test_every_module_of_a_room_is_in_a_folder(room: str) -> None:
    stray = {path.stem for path in house.modules() if path.parts[0] == room and len(path.parts) == 2}
    assert stray - DIRECTLY[room] - {"__init__"} == set(house_known.STRAY.get(room, "").split())


def test_no_folder_has_too_many_modules() -> None:
    sizes = Counter(str(path.parent) for path in house.modules() if path.stem != "__init__")
    crowded = {name for name, size in sizes.items() if size > MAX_MODULES}
    assert crowded == set(house_known.CROWDED)


@pytest.mark.parametrize("room", DIRECTLY)
def test_tests_stand_in_the_folders_of_what_they_test(room: str) -> None:
    """Directly in a room's folder are only tests of modules that are directly in the room."""
    for path in sorted((house.ROOT / "tests" / room).rglob("test_*.py")):
        place = path.parent.relative_to(house.ROOT / "tests")
        module = path.stem.removeprefix("test_")
        assert len(place.parts) > 1 or module in DIRECTLY[room], f"{path} belongs into a folder"
        assert (house.ROOT / place).is_dir(), f"{path}: {room} has no such folder"


def test_modules_and_functions_are_short() -> None:
    long = [
        f"{path}: {name} has {length} lines"
        for path in house.modules()
        for name, length, most in [
            ("it", len(house.source(path).splitlines()), MAX_LINES),
            *(
                (name, (one.end_lineno or 0) - one.lineno + 1, MAX_FUNCTION_LINES)
                for name, one in house.functions(path)
            ),
        ]
        if length > most
    ]
    assert not long


def test_modules_say_why_they_exist() -> None:
    silent = [
        str(path)
        for path in house.modules()
        if house.tree(path).body and not ast.get_docstring(house.tree(path))
    ]
    assert not silent


def test_module_openings_describe_software_and_not_people() -> None:
    tests = (path.relative_to(house.ROOT) for path in sorted((house.ROOT / "tests").rglob("*.py")))
    openings = {path: ast.get_docstring(house.tree(path)) or "" for path in (*house.modules(), *tests)}
    found = [f"{path}: {word}" for path, text in openings.items() for word in PERSONIFIED.findall(text)]
    assert not found, "write what happens, in the field's terms"


@pytest.mark.parametrize("room", FLOORS)
def test_no_function_takes_more_than_six_parameters(room: str) -> None:
    long = [
        f"{path}:{name}"
        for path in house.modules()
        if path.parts[0] == room
        and path.parts[:2] != ("pipeline", "cli")  # options of commands
        and str(path) not in MANY_PARAMETERS
        for name, function in house.functions(path)
        if len({one.arg for one in house.parameters(function)} - OPTIONS) > MAX_PARAMETERS
    ]
    assert long == house_known.LONG_LISTS.get(room, [])


def test_no_public_signature_of_the_core_says_any() -> None:
    vague = [
        f"{path}:{name}"
        for path in house.modules()
        if str(path).startswith(CORE)
        for name, function in house.functions(path)
        if house.is_public(name) and house.says_any(function)
    ]
    assert vague == house_known.VAGUE


def test_command_line_import_loads_no_heavy_library() -> None:
    code = "import sys, pipeline.cli.app; print([m for m in ('torch', 'ray', 'mlflow', 'deepspeed', 'open_clip', 'fsspec') if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=house.ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_merge_path_import_loads_no_torch() -> None:
    code = "import sys, merge_service.merge; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=house.ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


def test_merge_of_files_loads_nothing_that_only_recipes_need() -> None:
    code = """import sys
from pathlib import Path
from pipeline.cli.show_files import parameters_from
from pipeline.merging.files import FileMerge
from pipeline.recipes.of_files import with_texts
with_texts(FileMerge("ties", parameters_from([]), None, [Path("a.safetensors")], Path("m.safetensors")))
print([m for m in ("yaml", "pydantic", "pipeline.recipes.model") if m in sys.modules])"""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=house.ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_rows_of_techniques_import_no_numpy() -> None:
    code = "import sys, merge_service.timelines, merge_service.techniques as t; print(t.names() and 'numpy' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=house.ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


def test_nothing_outside_tests_unpickles_or_loads_yaml_unsafely() -> None:
    for path in house.modules():
        for call in ("torch.load(", "yaml.load(", "pickle.load(", "pickle.loads("):
            assert call not in house.source(path), f"{path} calls {call}"
