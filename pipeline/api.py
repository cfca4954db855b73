"""What the command line does, for Python: every function here ends in the one the command calls.

Invariant: importing this loads neither torch nor ray, mlflow or pandas, and a mistake is the `UserError` that the command
would have shown. `import temporal_merge` gives these names.
"""

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_service.errors import UserError
from merge_service.techniques import Param, Technique, nearest, register, technique
from pipeline.errors import speaks_python
from pipeline.merging.arrivals import Arrivals
from pipeline.merging.learn import learn
from pipeline.study.config import Study
from pipeline.study.config import load_study as read_study

if TYPE_CHECKING:
    import pandas as pd

    from merge_service.merge import MergeReport
    from pipeline.merging.along import Averaged
    from pipeline.plan.steps import Plan
    from pipeline.run.progress import Moment
    from pipeline.service.client.delivery import Delivery
    from pipeline.workspace.export import Exported
    from workers.data.importing import Imported
    from workers.evidence import Measured

__all__ = [
    "Arrivals", "Param", "Run", "Study", "Technique", "UserError", "evaluate", "import_data", "init", "learn", "load_study", "measure", "merge", "merge_files", "merge_recipe", "open_run", "plan",
    "register", "run", "technique", "techniques", "trajectory",
]  # fmt: skip

PathLike = Path | str
StateDict = Mapping[str, Any]
"""Tensors by name: all torch tensors, or all numpy arrays."""
METRICS = ("ka", "zs", "gm", "bwt", "zs_replayed", "zs_never_replayed")
"""Metrics of a point of which more is better."""


@speaks_python
def load_study(path: PathLike, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with `key.path=value` overrides. Raises ConfigError with every mistake found."""
    return read_study(path, overrides)


@speaks_python
def import_data(source: PathLike, out: PathLike, **options: Any) -> "Imported":
    """Make a dataset of the data root `out` out of pictures: class folders, a table of paths, a Hugging Face dataset on disk.

    `options` are those of `temporal-merge import-data` (name, role, template, classnames, val, test, seed, equal, unreadable,
    image_column, ...). Raises UserError, which names every picture that cannot be read.
    """
    from workers.data.importing import import_data as write
    from workers.data.importing import order_of

    return write(order_of(Path(source), **options), Path(out))


@speaks_python
def init(
    study: PathLike, data: PathLike, model: str, pretrained: str | None = None, force: bool = False
) -> Study:
    """Write a first study, with comments, for a data root and a model, and load it. Raises UserError."""
    from pipeline.plan.starter import write_starter

    write_starter(Path(study), Path(data), (model, pretrained), force)
    return read_study(study)


@speaks_python
def plan(study: Study, out: PathLike | None = None) -> dict[str, Any]:
    """What would run, as `temporal-merge plan --json` says it; nothing is written to `out`. Raises UserError."""
    from pipeline.run.timing.outlook import estimate, pace_known
    from pipeline.workspace.workspace import Workspace

    workspace = Workspace.of(study, _path(out), provisional=True)
    return {**workspace.summary(), "seconds": estimate(workspace, pace_known(workspace))}


@speaks_python
def run(
    study: Study,
    out: PathLike | None = None,
    address: str = "local",
    *,
    strict_versions: bool = False,
    progress: "Callable[[Moment], None] | None" = None,
    deliver: "Delivery | None" = None,
) -> "Run":
    """Run a study to its end, or go on where it stopped; `out` is runs/<study name> by default.

    Progress goes to stderr, in a notebook to a bar below the cell. `progress` is called instead, with a `Moment` (steps done, time left, what is
    running, where trajectories stand), up to four times a second. `address` is local, auto or HOST:PORT of a Ray cluster. With `strict_versions` artifacts in the
    store that other library versions made are refused. `deliver` sends every expert to a live service, in time-step order:
    `Delivery(service, {"license": "MIT"})`. Raises UserError, or StepFailed when a step failed too often.
    """
    from pipeline.report.notebook import bar_of_notebook
    from pipeline.run.driver import carry_out

    tell, beside = progress or bar_of_notebook(), deliver or nullcontext
    return Run(
        carry_out(study, _path(out), address, strict_versions=strict_versions, tell=tell, beside=beside)[0]
    )


@speaks_python
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
            whole = all("settings" in one for one in found["trajectories"])  # older results lack columns
            if found["complete"] and found["plan"] == self.plan.fingerprint and whole:
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there yet, or damaged: the store is the truth it is made from
        return results(self.plan, open_store(self.out))

    def frame(self) -> "pd.DataFrame":
        """One row per trajectory and t: axes, technique, KA, ZS, GM, forgetting, transfer, and every setting (`report.frames.points`)."""
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
        from pipeline.workspace.export import step_served
        from pipeline.workspace.opening import open_store

        step, _ = step_served(self.out, self.plan, trajectory, t)
        store = open_store(self.out)
        record = store.record(step.kind, step.fingerprint)
        if record is None:
            raise UserError(
                f"{trajectory} at t = {t} is not in {store.where} yet; run the study again to make it"
            )
        return store.open_verified(record)

    def export(self, trajectory: str, out: PathLike, t: int | None = None) -> "Exported":
        """The weights that a trajectory serves after t (by default at its end) as a new directory `out` that open_clip opens.

        Weights that the study keeps as a recipe are made there. Raises what `pipeline.workspace.export.export` does.
        """
        from pipeline.workspace.export import export

        return export(self.out, trajectory, t, Path(out))

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

    def status(self) -> dict[str, Any]:
        """How far the run is now, as `temporal-merge status --json` says it."""
        from pipeline.run.status import status_of

        return {**status_of(self.out)}

    def verify(self) -> list[str]:
        """Read every artifact again and check its bytes and its lineage: what is wrong, a sentence each."""
        from pipeline.workspace.opening import open_store

        return list(open_store(self.out).verify())

    def sync(self) -> dict[str, Any]:
        """Deliver to the tracker what it has not received: {"tracker_pending", "reason"}."""
        from pipeline.tracking.tracker import sync

        left, why = sync(self.out)
        return {"tracker_pending": left, "reason": why}

    @speaks_python
    def report(self, split: str | None = None) -> Path:
        """Write OUT/report (`temporal-merge report`): the page. Raises UserError when nothing was scored yet."""
        from pipeline.report.build import build_report

        return Path(build_report(self.out, split)["html"])

    def plot_plane(self, split: str | None = None) -> Any:
        """KA against ZS, a path per strategy: the report's figure as an altair chart. Raises UserError when nothing was scored yet."""
        from pipeline.report.plots import plot

        return plot(self.results, "plane", split)

    def plot_over_time(self, split: str | None = None) -> Any:
        """GM over t: the report's figure as an altair chart. Raises UserError when nothing was scored yet."""
        from pipeline.report.plots import plot

        return plot(self.results, "over_time", split)

    def _repr_html_(self) -> str:
        """What a notebook shows: where the run is, whether it is complete, and the last scores of every strategy."""
        from pipeline.report.notebook import table
        from pipeline.results.over_time import summary

        def text(value: Any) -> str:
            return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

        columns = ("group", "split", "seeds", "t", "ka", "zs", "gm")
        rows = [[text(row[name]) for name in columns] for row in summary(self.results)]
        state = "complete" if self.results["complete"] else "not complete"
        return f"<div><b>{html.escape(self.plan.study)}</b> in {html.escape(str(self.out))}: {state}</div>{table(list(columns), rows)}"


@speaks_python
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
    statistics: Sequence[PathLike | None] | None = None,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    **params: Any,
) -> "MergeReport | dict[str, Any]":
    """Merge experts, oldest first: files into `out`, or state dicts into a new one of the same kind.

    `params` are the technique's (see `techniques`), in the terms of `parity` if that is given (`merge_service.timelines.parity`). The result of state dicts is bit for bit that of files, with the names, dtypes and devices of the base (of the first expert
    without one). `ids` name the
    experts, whose names (and random masks) otherwise come from their content; `strip_prefix` is taken off tensor names that
    begin with it; with `any_base` experts that cannot have been trained from the base are merged all the same. `statistics` are the
    files of what was measured of each expert (see `measure`), for techniques that need it; of files EXPERT.KIND.safetensors beside the
    expert by default. `inputs` has arrays of every expert's task, for techniques that measure all experts together (regmean_plus).
    Raises UserError, of which `merge_service.merge` says more.
    """
    if isinstance(experts, str | Path | Mapping) or not isinstance(experts, Iterable):
        raise UserError("experts is a list of checkpoints, even of one: merge(technique, [expert], ...)")
    experts = [*experts]
    _check_options(ids, strip_prefix, any_base)
    given = [*experts, *([] if base is None else [base])]
    files = [isinstance(one, str | Path) for one in given]
    options: dict[str, Any] = {
        "parity": parity,
        "ids": ids,
        "strip_prefix": strip_prefix,
        "any_base": any_base,
    }
    if not any(files) and given:
        if out is not None:
            raise UserError(
                "out is for files; state dicts are merged into the one that is returned: leave it out"
            )
        from pipeline.merging.state_dicts import merge_state_dicts

        return merge_state_dicts(technique, params, base, experts, **options, statistics=statistics)  # type: ignore[arg-type]
    if not all(files):
        raise UserError(
            "experts and base are all files, or all state dicts; load or save the ones that differ"
        )
    if out is None or not str(out):
        raise UserError("merging files needs out, the file or directory to write")
    paths = [Path(one) for one in given if isinstance(one, str | Path)]
    if inputs is not None:
        from pipeline.merging.together import merge_together

        what = (technique, params, None if base is None else paths[-1], paths[: len(experts)], Path(out))
        return merge_together(what, inputs, options)
    start = None if base is None else paths[-1]
    return merge_files(
        technique, params, start, paths[: len(experts)], Path(out), **options, statistics=statistics
    )


def _check_options(ids: object, strip_prefix: object, any_base: object) -> None:
    """Raise UserError for an option of `merge` that has another type: a text would count as true, or as one id per letter."""
    if not isinstance(any_base, bool):
        raise UserError(f"any_base = {any_base!r} is not true or false")
    if not isinstance(strip_prefix, str | None):
        raise UserError(f"strip_prefix = {strip_prefix!r} is not text")
    named = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    wrong = [one for one in named if one is not None and not (isinstance(one, str) and one.strip())]
    if wrong or isinstance(ids, str):
        raise UserError(f"ids = {ids!r} is not a list with a name, or None, for every expert")


@speaks_python
def measure(
    kind: str,
    checkpoint: PathLike,
    inputs: Mapping[str, Any],
    *,
    out: PathLike | None = None,
    **params: Any,
) -> "Measured":
    """Measure a statistic of a checkpoint on arrays: `gram`, `fisher`, `kfac` or `gradient` (`temporal-merge measure`).

    `inputs` has what the kind needs of: images, floats [N, 3, H, W] as the model takes them or uint8 [N, H, W, 3]; tokens
    [M, context] (captions for gram, one prompt per class otherwise); labels [N]; head, frozen class embeddings [C, d], with which the
    image tower alone is measured, at the temperature of `base` (the checkpoint's own without one). Arrays are numpy or torch.
    `params` are examples, seed, precision (fp32, bf16), device, of gram scope (all, blocks), of the others labels (sample, expectation,
    given) and towers (image, both); `base`, a checkpoint; and `model`, the architecture of a file without a configuration beside it. Returns the tensors by name, with `rows`, and
    writes them to `out`. Raises UserError.
    """
    from workers.evidence import Asked, Inputs, Where
    from workers.evidence import measure as measured

    base, model = params.pop("base", None), params.pop("model", None)
    where = Where(Path(checkpoint), _path(base), _path(out), model)
    return measured(Asked.of(kind, params), where, Inputs.of(inputs))


@speaks_python
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


@speaks_python
def merge_recipe(
    recipe: PathLike, out: PathLike, *, dtype: str | None = None, replace: bool = False, **options: Any
) -> "MergeReport":
    """`temporal-merge merge RECIPE.yaml`: carry out a recipe of ours or of mergekit. `options` are those of `Execution`.

    Raises UserError with every mistake in the recipe, or naming the model that cannot be merged.
    """
    from pipeline.merging.files import Execution
    from pipeline.recipes.carry_out import Output
    from pipeline.recipes.carry_out import merge_recipe as carry_out
    from pipeline.recipes.read import read_recipe

    return carry_out(
        read_recipe(Path(recipe)).recipe, Output(Path(out), replace, dtype), Execution(**options)
    )


@speaks_python
def trajectory(
    checkpoints: Sequence[PathLike], out: PathLike, *, threads: int | None = None, **options: Any
) -> "Averaged":
    """`temporal-merge trajectory`: averages of the last checkpoints of one run, in one pass. `options` are the other fields of `Along`
    (windows, shapes, every, dtype, shard_size, replace). Raises UserError.
    """
    from pipeline.merging.along import Along, merge_along

    return merge_along(Along([Path(one) for one in checkpoints], Path(out), **options), threads)


@speaks_python
def evaluate(
    checkpoint: PathLike,
    study: Study,
    datasets: Sequence[str] | None = None,
    split: str | None = None,
    details: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score one checkpoint exactly as a run of the study would; what `temporal-merge evaluate --json` says.

    `split` is test or val, by default the study's. `details` are of top5, mean_per_class, per_class, confusion.
    """
    from pipeline.run.evaluation import score

    return {**score(Path(checkpoint), study, datasets, split, details)}


def techniques() -> list[dict[str, Any]]:
    """Every merging technique: name, formula, paper, needs, forms, parameters with default and meaning."""
    from pipeline.merging.techniques import techniques_as_json

    return list(techniques_as_json(None))


def _path(out: PathLike | None) -> Path | None:
    return None if out is None else Path(out)
