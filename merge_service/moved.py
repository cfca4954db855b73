"""Import paths of earlier versions, each of which leads to the present module.

Scripts and packages of users import modules by the paths that they had before there were folders. A module that was divided since
gives the names of all its parts.

Invariant: an old path gives the same module object as the new one, not a copy, and warns; nothing in this project uses an old
path.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

FOLDERS = {
    "merge_service": {
        "anatomy": "packed",
        "blocks": "device kernels masks",
        "checkpoints": "admission buffers checkpoint configurations dtypes foreign header relation shards target ties unmergeable writer",
        "engine": "fused kept_limits=thresholds_cache split state=stream_state survey",
        "files": "leftovers mapping",
        "merging": "geometry intake jobs",
        "service": "actor=actors",
        "techniques": "catalogue=families catalogue_tensors=families own params",
        "techniques.families": "joint=balance+selections matrices=spectra+projections rules=averages+sums+elections+selections "
        "spherical=arcs+stock",
        "timelines": "parity timeline=time",
    },
    "pipeline": {
        "": "fingerprint=identity",
        "cli": "cli_files=files cli_options=options cli_studies=studies cli_upkeep=upkeep show",
        "files": "disk ownership",
        "merging": "state_dicts",
        "plan": "expand=draft facts plan_file=file prompt_notes steps",
        "run": "deadlines driver evaluation events jobs lanes others output progress schedule status submit timeline=trace",
        "store": "artifact audit lease store_names=names store_objects=objects store_open=open store_remote=remote store_upkeep=upkeep versions",
        "study": "addresses config file_kinds grid mistakes places sections sections_stream sections_tracking strategies stream_tables streams suites yaml_input",
        "tracking": "outbox recording=session tracking_recorder=recorder",
        "tracking.mlflow": "tracking_client=client tracking_export=export tracking_local=local tracking_sink=sink tracking_ui=ui ui_server",
        "tracking.rows": "tracking_events=events tracking_experts=experts tracking_index=index tracking_lineage=lineage tracking_names=names tracking_rows=rows",
        "workspace": "gc lock opening registry=registrations",
    },
    "workers": {
        "data.mini": " ".join(
            f"data.mini_{name}={name}"
            for name in [
                "alike",
                "drawings",
                "emoji",
                "fonts",
                "packages",
                "pictures",
                "scan",
                "scans",
                "words",
            ]
        ),
        "pretrain": "pretrain_page=page pretrain_recipe=recipe",
        "models": "base configuration export model network weights",
        "scoring": "evaluate prompts stream_orders",
        "training": "batch_norm budget engine=engines objective recipe scratch=checkpoints train=expert",
        "training.engines": "engine_deepspeed=deepspeed_engine",
    },
}
"""By room and folder, the modules that moved there: `old=new` if they were renamed, `old=one+another` if they were divided."""


def moves() -> dict[str, tuple[str, ...]]:
    """Dotted paths: old to new."""
    table = {}
    for room, folders in FOLDERS.items():
        for folder, names in folders.items():
            for pair in names.split():
                old, _, new = pair.partition("=")
                table[f"{room}.{old}"] = tuple(
                    ".".join(part for part in (room, folder, name) if part)
                    for name in (new or old.rpartition(".")[2]).split("+")
                )
    return table


class _Moved:
    """A finder and loader of modules that are imported by their old paths."""

    def __init__(self) -> None:
        self.table = moves()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self.table else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = self.table[module.__name__]
        _warn(module.__name__, " and ".join(new))
        if len(new) > 1:
            vars(module)["__getattr__"] = names_from(*new)
        else:  # the import system returns what stands here
            sys.modules[module.__name__] = importlib.import_module(*new)


def lead() -> None:
    """Enable old import paths; repeating this changes nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def names_from(*modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that was a module: a name is looked up in these modules, in order."""

    def look_up(name: str) -> Any:
        for module in () if name.startswith("__") else modules:
            found = importlib.import_module(module)
            if hasattr(found, name):
                _warn(name, module)
                return getattr(found, name)
        raise AttributeError(name)

    return look_up


def renamed(**new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function whose keywords had other names in earlier versions (`old="new"`): it accepts these too."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in new.keys() & kwargs.keys():
                _warn(f"the argument {old}", new[old], "is called")
                kwargs[new[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def _warn(old: str, new: str, how: str = "is in") -> None:
    warnings.warn(f"{old} {how} {new} now", DeprecationWarning, stacklevel=3)
