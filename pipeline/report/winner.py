"""Where the advised model is, and how to use it.

Invariant: a command that is shown works as copied, from the directory in which the report command ran.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.plan.steps import BASE
from pipeline.report.sources import Studied
from pipeline.results.over_time import winner


@dataclass(frozen=True)
class Winner:
    """The last checkpoint of the advised trajectory: its directory, the sha256 of its weights, and `ways` to use it, a title and a
    command or some Python each."""

    trajectory: str
    t: int
    task: str
    directory: str
    linked: bool
    sha256: str
    base: str
    base_sha256: str
    ways: tuple[tuple[str, str], ...]


def winner_of(studied: Studied, name: str) -> Winner | None:
    """The model that the trajectory serves at the last t whose weights are in the store; None if there is none."""
    trajectory, records = studied.trajectory(name), studied.records
    base = records.get(trajectory.base)
    for point in reversed(trajectory.points):
        record = base if point.deployed == BASE else records.get(point.deployed)
        if record is not None and base is not None:
            break
    else:
        return None
    remote = studied.store is not None and "://" in studied.store.where
    where = f"{studied.store.where}/{record.kind}/{record.fingerprint}" if remote and studied.store else str(record.path)  # fmt: skip
    python = f'import temporal_merge as tm\n\npath = tm.open_run("{studied.out}").checkpoint("{name}", {point.t})  # sha256 checked'
    made = remote or record.is_made  # the path exists only after a call for the weights
    place = "{path}" if made else where
    f = "f" if made else ""
    load = f'import open_clip\n\nmodel, _, preprocess = open_clip.create_model_and_transforms({f}"local-dir:{place}")\ntokenizer = open_clip.get_tokenizer({f}"local-dir:{place}")'
    ways = [("Load", f"{python}\n{load}" if made else load)]
    ways.append(
        (
            "Export",
            f"temporal-merge export {studied.out} --trajectory {shlex.quote(name)} --t {point.t} --out exported-model",
        )
    )
    if not made:
        ways.append(("Score again", f"temporal-merge evaluate {where} --study {studied.out / 'study.yaml'}"))
    ways += _registered(studied, name)
    return Winner(
        name, point.t, point.task, where, not remote, record.sha256(WEIGHTS_FILE) or "",
        trajectory.model, base.sha256(WEIGHTS_FILE) or "", tuple(ways),
    )  # fmt: skip


def _registered(studied: Studied, name: str) -> list[tuple[str, str]]:
    """How MLflow serves the model, if it is the version that the study registered."""
    tracking = studied.written.get("tracking") or {}
    registry = tracking.get("registry")
    database = studied.out / "mlflow.db"
    uri = tracking.get("uri") or (f"sqlite:///{database}" if database.is_file() else None)
    if uri is None or not registry or not studied.answer["complete"]:
        return []
    if winner(studied.answer, registry.get("by", "gm")) != name:
        return []
    model = f"models:/{registry.get('name') or studied.plan.study}@{registry.get('alias', 'best')}"
    return [
        ("Serve", f"MLFLOW_TRACKING_URI={uri} mlflow models serve --model-uri {model} --env-manager local"),
    ]


def command_of(out: Path) -> str:
    """The command that runs the study and continues it. study.yaml includes everything that was set on the command line."""
    return f"temporal-merge run {out / 'study.yaml'} --out {out}"
