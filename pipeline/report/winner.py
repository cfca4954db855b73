"""Where the advised model is, how to use it, and which weight of a running average to try next.

Invariant: a command that is shown works as copied, from the directory in which the report command ran; a weight is stated only where
it was measured that such a weight pays.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.plan.steps import BASE, TrajectoryPlan
from pipeline.report.sources import Studied
from pipeline.results.ema_weight import MEASURED
from pipeline.results.over_time import winner

NEAR = 0.05
"""Weights that are no further apart count as one."""


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


def weight_to_try(studied: Studied, name: str) -> str:
    """A sentence with the weight of `ema → ema` that fits the measured drift (docs/when_ema.md), under the settings of a trajectory.

    "" if the study that found the function did not measure such a drift or replay, if nothing was fine-tuned under the same settings,
    or if such a weight is in the run already.
    """
    settings_id = studied.trajectory(name).settings_id
    alike = [one for one in studied.plan.trajectories if one.settings_id == settings_id]
    drift, share = _drift(studied, alike), _replay(studied.plan.settings.get(settings_id, {}))
    if drift is None or share is None or not MEASURED.covers(drift, share):
        return ""
    weight = MEASURED.weight(drift, share)
    tried = [
        one.params["weight"] for one in alike if one.init == one.deploy == "ema" and "weight" in one.params
    ]
    if any(abs(other - weight) <= NEAR for other in tried):
        return ""
    return (
        f" To try next: best_in_time with a weight of {weight:.2f}, by the drift of fine-tuning's experts ({drift:.3f} of the norm of "
        f"their weights) and the share of replay ({share:g}); the weight was fitted to small models (docs/when_ema.md)."
    )


def _drift(studied: Studied, trajectories: Sequence[TrajectoryPlan]) -> float | None:
    """The mean relative drift of the experts of fine-tuning; None if none was measured."""
    records = [
        studied.records.get(point.train or "")
        for one in trajectories
        if one.init == one.deploy == "latest"
        for point in one.points
    ]
    found = [record.result.get("relative_drift") for record in records if record is not None]
    drifts = [drift for drift in found if drift is not None]
    return math.fsum(drifts) / len(drifts) if drifts else None


def _replay(settings: Mapping[str, Any]) -> float | None:
    """The share of replay in a batch; None unless half of it is from the pretraining pool and half from earlier tasks."""
    pool, buffer = (settings.get(f"recipe.mixture.{part}") for part in ("pretraining", "buffer"))
    if pool is None or buffer is None or not math.isclose(pool, buffer, abs_tol=1e-6):
        return None
    return float(pool + buffer)


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
