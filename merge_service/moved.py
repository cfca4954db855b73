"""Import paths of earlier versions: each leads to the module that stands elsewhere now.

Scripts and packages of other people name modules of the time before there were folders. Invariant: an old path gives the very
module of the new one, not a second copy of it, and warns; nothing in this project uses an old path.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FOLDERS = {
    "merge_service": {
        "anatomy": "packed",
        "blocks": "device kernels masks",
        "checkpoints": "admission buffers checkpoint configurations dtypes foreign header relation shards target ties unmergeable writer",
        "engine": "fused kept_limits=thresholds_cache split state=stream_state survey",
        "files": "leftovers mapping",
        "merging": "geometry intake jobs",
        "service": "actor=actors",
        "techniques": "catalogue catalogue_tensors joint matrices own params rules spherical",
        "timelines": "parity timeline=time",
    },
    "pipeline": {
        "": "fingerprint=identity",
        "cli": "cli_files=files cli_options=options cli_studies=studies cli_upkeep=upkeep show signals",
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
        "models": "base configuration export model network weights",
        "scoring": "evaluate prompts stream_orders",
        "training": "batch_norm budget engine=engines objective recipe scratch=checkpoints train=expert",
        "training.engines": "engine_deepspeed=deepspeed_engine",
    },
}
"""By room and folder the modules that moved there, `old=new` where they have another name now."""


def moves() -> dict[str, str]:
    """Dotted paths: old to new."""
    table = {}
    for room, folders in FOLDERS.items():
        for folder, names in folders.items():
            for pair in names.split():
                old, _, new = pair.partition("=")
                table[f"{room}.{old}"] = ".".join(
                    part for part in (room, folder, new or old.rpartition(".")[2]) if part
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
        _warn(module.__name__, new)
        sys.modules[module.__name__] = importlib.import_module(
            new
        )  # the import system returns what stands here


def lead() -> None:
    """Have old import paths work from now on; doing it again changes nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def names_from(*modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that a module has become: a name is looked up in these modules, in order."""

    def look_up(name: str) -> Any:
        for module in () if name.startswith("__") else modules:
            found = importlib.import_module(module)
            if hasattr(found, name):
                _warn(name, module)
                return getattr(found, name)
        raise AttributeError(name)

    return look_up


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} stands in {new} now", DeprecationWarning, stacklevel=3)
