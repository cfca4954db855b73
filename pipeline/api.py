"""What the command line does, for Python: every function here ends in the one the command calls.

Invariant: importing this loads neither torch nor ray, mlflow or pandas, and a mistake is the `UserError` that the command
would have shown. `import temporal_merge` gives these names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_service.errors import UserError
from merge_service.techniques import Param, Technique, nearest, register, technique
from pipeline.study.config import Study
from pipeline.study.config import load_study as read_study

if TYPE_CHECKING:
    import pandas as pd

    from merge_service.merge import MergeReport
    from pipeline.plan.steps import Plan

__all__ = [
    "Param", "Run", "Study", "Technique", "UserError", "evaluate", "load_study", "merge", "merge_files", "open_run", "plan",
    "register", "run", "technique", "techniques",
]  # fmt: skip

PathLike = Path | str
StateDict = Mapping[str, Any]
"""Tensors by name: all torch tensors, or all numpy arrays."""
METRICS = ("ka", "zs", "gm", "bwt", "zs_replayed", "zs_never_replayed")
"""Metrics of a point of which more is better."""


def load_study(path: PathLike, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with `key.path=value` overrides. Raises ConfigError with every mistake found."""
    return read_study(path, overrides)


def plan(study: Study, out: PathLike | None = None) -> dict[str, Any]:
    """What would run, as `temporal-merge plan --json` says it; nothing is written to `out`. Raises UserError."""
    from pipeline.workspace.workspace import Workspace

    return Workspace.of(study, _path(out), provisional=True).summary()


def run(
    study: Study, out: PathLike | None = None, address: str = "local", *, strict_versions: bool = False
) -> "Run":
    """Run a study to its end, or go on where it stopped; `out` is runs/<study name> by default.

    Progress goes to stderr. `address` is local, auto or HOST:PORT of a Ray cluster. With `strict_versions` artifacts in the
    store that other library versions made are refused. Raises UserError, or StepFailed when a step failed too often.
    """
    from pipeline.run.driver import carry_out

    return Run(carry_out(study, _path(out), address, strict_versions=strict_versions)[0])


def open_run(out: PathLike) -> "Run":
    """A run that was made earlier, or is under way. Raises UserError if `out` holds none."""
    found = Run(Path(out))
    found.plan  # noqa: B018  there is one, or this says so
    return found


@dataclass(frozen=True)
class Run:
    """What lies in OUT, as it was when it was first asked for: open the run again to see what has been added."""

    out: Path

    @cached_property
    def plan(self) -> "Plan":
        """Its trajectories and steps."""
        from pipeline.workspace.opening import open_plan

        return open_plan(self.out)

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json; while the run is not complete, the same of what is in the store so far."""
        from pipeline.results.over_time import results
        from pipeline.workspace.opening import open_store
        from pipeline.workspace.workspace import RESULTS_FILE

        try:
            found = json.loads((self.out / RESULTS_FILE).read_text(encoding="utf-8"))
            if found["complete"] and found["plan"] == self.plan.fingerprint:
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there yet, or damaged: the store is the truth it is made from
        return results(self.plan, open_store(self.out))

    def frame(self) -> "pd.DataFrame":
        """One row per trajectory and t: axes, technique, KA, ZS, GM, forgetting, transfer (`report.frames.points`)."""
        from pipeline.report.frames import points

        return points(self.results)

    def scores(self) -> "pd.DataFrame":
        """One row per trajectory, t and dataset, with its role and score (`report.frames.scores`)."""
        from pipeline.report.frames import scores

        return scores(self.results)

    def checkpoint(self, trajectory: str, t: int) -> Path:
        """The directory of the weights that a trajectory serves after t, checked against their sha256; t=0 is the base.

        Raises UserError when there is no such trajectory or t, or the weights are not there yet, and CorruptArtifact when
        they are damaged.
        """
        from pipeline.plan.steps import BASE
        from pipeline.workspace.opening import open_store

        known = {one.id: one for one in self.plan.trajectories}
        if trajectory not in known:
            raise UserError(
                f"{self.out} has no trajectory {trajectory!r}{nearest(trajectory, known)}; run.frame() lists them"
            )
        points = {point.t: point for point in known[trajectory].points}
        if t not in points:
            raise UserError(f"{trajectory} has no t = {t}; it has {', '.join(map(str, points))}")
        deployed = points[t].deployed
        step = self.plan.weights_step(known[trajectory].base if deployed == BASE else deployed)
        store = open_store(self.out)
        record = store.record(step.kind, step.fingerprint)
        if record is None:
            raise UserError(
                f"{trajectory} at t = {t} is not in {store.where} yet; run the study again to make it"
            )
        return store.open_verified(record)

    def best(self, by: str = "gm", split: str | None = None) -> dict[str, Any]:
        """The trajectory with the highest `by` (one of `METRICS`) at its last t; of equal ones the first in the study.

        What it is, and its point of results.json. Scores are of `split`, by default of val where some are, else of test. Raises
        UserError when no trajectory has come to its end.
        """
        from pipeline.results.over_time import on_split, splits_of

        if by not in METRICS:
            raise UserError(f"by = {by!r}{nearest(by, METRICS)}; choose one of {', '.join(METRICS)}")
        scored = splits_of(self.results)
        if split not in (None, *scored):
            raise UserError(f"{self.out} holds no scores on {split}; it has {' and '.join(scored)}")
        last = {one.id: one.points[-1].t for one in self.plan.trajectories}
        ended = [
            {"trajectory": one["id"], **{k: v for k, v in one.items() if k not in ("id", "steps")}, **one["steps"][-1]}
            for one in on_split(self.results, split or scored[-1])["trajectories"]
            if one["steps"] and one["steps"][-1]["t"] == last[one["id"]]
        ]  # fmt: skip
        ended = [one for one in ended if one.get(by) is not None]
        if not ended:
            raise UserError(
                f"{self.out}: no trajectory has a {by} at its last t yet; run the study to its end"
            )
        return max(ended, key=lambda one: one[by])


def merge(
    technique: str,
    experts: Sequence[PathLike] | Sequence[StateDict],
    base: PathLike | StateDict | None = None,
    out: PathLike | None = None,
    *,
    parity: str | None = None,
    ids: Sequence[str | None] | None = None,
    strip_prefix: str | None = None,
    any_base: bool = False,
    **params: Any,
) -> "MergeReport | dict[str, Any]":
    """Merge experts, oldest first: files into `out`, or state dicts into a new one of the same kind.

    `params` are the technique's (see `techniques`), in the terms of `parity` if that is given (`merge_service.timelines.parity`). State dicts go through temporary files, so that their result is bit
    for bit that of files; it has the names, dtypes and devices of the base (of the first expert without one). `ids` name the
    experts, whose names (and random masks) otherwise come from their content; `strip_prefix` is taken off tensor names that
    begin with it; with `any_base` experts that cannot have been trained from the base are merged all the same. Raises
    UserError, of which `merge_service.merge` says more.
    """
    if isinstance(experts, str | Path | Mapping):
        raise UserError("experts is a list of checkpoints, even of one: merge(technique, [expert], ...)")
    given = [*experts, *([] if base is None else [base])]
    files = [isinstance(one, str | Path) for one in given]
    if not any(files) and given:
        if out is not None:
            raise UserError(
                "out is for files; state dicts are merged into the one that is returned: leave it out"
            )
        from pipeline.merging.state_dicts import merge_state_dicts

        options = {"parity": parity, "ids": ids, "strip_prefix": strip_prefix, "any_base": any_base}
        return merge_state_dicts(technique, params, base, experts, **options)  # type: ignore[arg-type]
    if not all(files):
        raise UserError(
            "experts and base are all files, or all state dicts; load or save the ones that differ"
        )
    if out is None:
        raise UserError("merging files needs out, the file or directory to write")
    paths = [Path(one) for one in given if isinstance(one, str | Path)]
    options = {"parity": parity, "ids": ids, "strip_prefix": strip_prefix, "any_base": any_base}
    start = None if base is None else paths[-1]
    return merge_files(technique, params, start, paths[: len(experts)], Path(out), **options)


def merge_files(
    technique: str,
    params: Mapping[str, Any],
    base: Path | None,
    experts: Sequence[Path],
    out: Path,
    **options: Any,
) -> "MergeReport":
    """`temporal-merge merge`; `options` are the other fields of `FileMerge` and those of `Execution` (`pipeline.merging.files`).

    Raises UserError, also if `out` is an input.
    """
    from pipeline.merging import files

    names = [one.name for one in fields(files.Execution)]
    how = files.Execution(**{name: options.pop(name) for name in names if name in options})
    return files.merge_files(files.FileMerge(technique, params, base, experts, out, **options), how)


def evaluate(
    checkpoint: PathLike, study: Study, datasets: Sequence[str] | None = None, split: str | None = None
) -> dict[str, Any]:
    """Score one checkpoint exactly as a run of the study would; what `temporal-merge evaluate --json` says.

    `split` is test or val, by default the study's.
    """
    from pipeline.run.evaluation import score

    return score(Path(checkpoint), study, datasets, split)


def techniques() -> list[dict[str, Any]]:
    """Every merging technique: name, formula, paper, needs, forms, parameters with default and meaning."""
    from pipeline.merging.techniques import techniques_as_json

    return list(techniques_as_json(None))


def _path(out: PathLike | None) -> Path | None:
    return None if out is None else Path(out)
