"""The plan and the store of a run, opened by a process that is not its driver.

Invariant: opening changes nothing, and an error names the path that cannot be read.
"""

import json
from pathlib import Path

import yaml

from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.plan.file import read
from pipeline.plan.steps import Plan
from pipeline.store.local import CACHE_BYTES, Store
from pipeline.store.open import store_at


def open_plan(out: Path) -> Plan:
    """The plan of a run. Raises UserError if OUT holds none."""
    try:
        return read(out / "plan.json")
    except OSError:
        raise UserError(
            f"{out} holds no run (no plan.json); give the directory that `temporal-merge run` wrote, e.g. runs/demo"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{out / 'plan.json'} is damaged ({error}); run the study again to rewrite it"
        ) from None


def open_store(out: Path) -> Store:
    """The store of a run. Raises UserError if OUT holds none."""
    open_plan(out)
    return store_of(out)


def store_of(out: Path) -> Store:
    """The store of the run in OUT, according to its study.yaml. Raises ConfigError if that cannot be read."""
    try:
        tree = yaml.safe_load((out / "study.yaml").read_text(encoding="utf-8"))
        storage = tree.get("storage") or {}
        return store_at(storage.get("store"), out, cache_bytes=int(storage.get("cache", CACHE_BYTES)))
    except FileNotFoundError:
        return store_at(None, out)
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{out / 'study.yaml'} cannot be read ({error}); run the study again to rewrite it"
        ) from None
