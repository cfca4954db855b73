"""Runs a piece: its base, its run through the command line, its rows; a finished piece is never run again.

Invariant: runs resume where they stopped as long as their folder exists; a piece is finished once its numbers are written, and
only then may its store be deleted.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.errors import UserError
from pipeline.claims.programs import Program, commit, run_programs, study_program
from pipeline.claims.when_ema import numbers
from pipeline.claims.when_ema.design import CORES, MODELS, Design, Piece
from pipeline.claims.when_ema.recording import Experts, points_of
from pipeline.store.artifact import hash_file
from pipeline.workspace.opening import open_plan


@dataclass(frozen=True)
class Places:
    """Where runs and bases are (`work`, may be deleted) and where numbers are kept. `extra` settings apply to every run."""

    work: Path
    kept: Path
    extra: tuple[str, ...] = ()
    keep_runs: bool = False

    def base(self, piece: Piece) -> Path:
        return self.work / "bases" / f"{piece.model}-{piece.replicate}"

    def run(self, piece: Piece) -> Path:
        return self.work / piece.key


def make_bases(ahead: Sequence[Piece], design: Design, places: Places) -> None:
    """Make the base of the first of these pieces, and, if that is missing, the next missing one of its model at the same time.

    Raises UserError if one fails, or if the base is not that of the finished pieces of its replicate.
    """
    piece = ahead[0]
    out = places.base(piece)
    missing = {
        places.base(one): one for one in ahead if one.model == piece.model and not _is_made(places.base(one))
    }
    if out in missing:
        run_programs(*(_base_program(place, one, design) for place, one in islice(missing.items(), CORES)))
    found, known = hash_file(out / WEIGHTS_FILE), numbers.base_of(places.kept, piece)
    if known not in (None, found):
        raise UserError(
            f"{out} has the sha256 {found[:12]}, the finished pieces of replicate {piece.replicate} began at {known}; make them again under "
            f"another --numbers, or use the machine and libraries that made them"
        )


def _is_made(out: Path) -> bool:
    return (out / WEIGHTS_FILE).is_file() and not (out / "work").exists()


def _base_program(out: Path, piece: Piece, design: Design) -> Program:
    recipe, seed = MODELS / piece.model / "recipe.yaml", str(design.base_seed + piece.replicate)
    words = ("-m", "workers.pretrain", str(recipe), "--out", str(out), "--seed", seed)
    return Program(f"base {out.name}", words)


def carry_out(piece: Piece, design: Design, places: Places) -> None:
    """Run the piece and keep its numbers; then remove the run. Raises UserError if a run does not finish."""
    began = time.monotonic()
    out = places.run(piece)
    settings = [*design.overrides(piece, places.base(piece)), *places.extra]
    run_programs(study_program(piece.key, design.study, out, settings))
    experts = Experts(out)
    frames = {
        "points": points_of(out),
        "experts": experts.frame(),
    }
    about = {
        "base_sha256": hash_file(places.base(piece) / WEIGHTS_FILE),
        "plan": open_plan(out).fingerprint,
        "commit": commit(),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    frames["made"] = pd.DataFrame([{**_setting(piece, experts), **about}])
    numbers.write(places.kept, piece, frames)
    if not places.keep_runs:
        shutil.rmtree(out)


def _setting(piece: Piece, experts: Experts) -> dict[str, Any]:
    """The setting of the run, read from its study."""
    study = experts.workspace.study
    (stream,), cell = study.streams, study.cells[-1]
    mixture = cell.recipe.mixture
    return {
        "piece": piece.name,
        "replicate": piece.replicate,
        "model": cell.model.config,
        "share": round(mixture.pretraining + mixture.buffer, 6),
        "pretraining": mixture.pretraining,
        "buffer": mixture.buffer,
        "steps_per_task": cell.budget.steps_per_task,
        "tasks": stream.chunks,
    }
