"""A run as it lies in OUT, for whoever is not its driver: its plan and its store.

Invariant: opening changes nothing, and what cannot be read is named with its path.
"""

import json
from pathlib import Path

import yaml

from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.plan.file import read
from pipeline.plan.steps import Plan
from pipeline.store.local import Store
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
            f"{out / 'plan.json'} is damaged ({error}); run the study again to write it anew"
        ) from None


def open_store(out: Path) -> Store:
    """The store of a run. Raises UserError if OUT holds none."""
    open_plan(out)
    return store_of(out)


def store_of(out: Path) -> Store:
    """The store of the run in OUT, as its study.yaml says. Raises ConfigError if that cannot be read."""
    try:
        tree = yaml.safe_load((out / "study.yaml").read_text(encoding="utf-8"))
        return store_at((tree.get("storage") or {}).get("store"), out)
    except FileNotFoundError:
        return store_at(None, out)
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{out / 'study.yaml'} cannot be read ({error}); run the study again to write it anew"
        ) from None
