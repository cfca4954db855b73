"""Carries a recipe out: each merge of its chain in turn, the last one into the output.

A merge that treats all tensors alike is a merge of files, with all options of one. Layers, modules and parameters that differ
between tensors are merged as groups of tensors.

Invariant: the output has the bytes that either way gives; earlier merges of a chain lie beside the output while they are needed.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_service.checkpoints import absolute, bytes_of, overwrites, written
from merge_service.engine import Execution as Running
from merge_service.errors import UserError
from merge_service.merge import MergeReport
from merge_service.merging import Group, MergePlan, Out, Rules, Way, combine_groups, plan_groups
from pipeline.merging.files import Execution, FileMerge, merge_files, refuse_to_replace
from pipeline.merging.planning import plan_files
from pipeline.merging.remote.near import is_remote, near, with_slashes
from pipeline.recipes.card import beside
from pipeline.recipes.layers import made_of
from pipeline.recipes.model import Merge, Recipe
from pipeline.recipes.operators import Chooser
from pipeline.recipes.vocabulary import worded


@dataclass(frozen=True)
class Output:
    """Where the result of a recipe goes. Without `replace`, an existing `out` is an error. `dtype` takes precedence over the recipe's.
    `any_base` also merges experts that cannot have been trained from the base.
    """

    out: Path
    replace: bool = True
    dtype: str | None = None
    any_base: bool = False


def merge_recipe(recipe: Recipe, output: Output, how: Execution = Execution()) -> MergeReport:
    """Carry a recipe out; the report of the last merge, with the notes of all. Raises UserError, which names the merge of a chain."""
    if not output.replace:
        refuse_to_replace(output.out)
    with _near(recipe, how) as here:
        return _carried(here, output, how)


@contextmanager
def _near(recipe: Recipe, how: Execution) -> Iterator[Recipe]:
    """The recipe with folders of this machine in the place of remote models, for the length of a `with` block."""
    with near([path for one in recipe.merges for path in one.models]) as places:
        if places and (how.workers > 1 or how.address):
            raise UserError(
                "remote models are fetched by one process; leave --workers out, or load them first"
            )
        yield Recipe(merges=tuple(one.with_models(places) for one in recipe.merges)) if places else recipe


def _carried(recipe: Recipe, output: Output, how: Execution) -> MergeReport:
    texts = beside(recipe)
    notes: list[str] = []
    *earlier, last = recipe.merges
    parent = output.out.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".merges-", dir=_made(parent) if earlier else None) as room:
        places: dict[str, str] = {}
        for one in earlier:
            place = Path(room) / str(one.name)
            try:
                report = _one(
                    one.with_models(places), replace(output, out=place, replace=True, dtype=None), {}, how
                )
            except UserError as error:
                raise type(error)(f"merge {one.name}: {error}") from error
            places[str(one.name)] = str(report.out)
            notes += [f"{one.name}: {note}" for note in report.notes]
        report = _one(last.with_models(places), output, texts, how)
    return replace(report, notes=(*notes, *report.notes))


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def plan_recipe(recipe: Recipe, output: Output, how: Execution = Execution()) -> MergePlan:
    """The plan of `merge_recipe`, for a recipe of one merge. Raises UserError, also for a chain: later merges read what is not there yet."""
    if not output.replace:
        refuse_to_replace(output.out)
    *earlier, merge = recipe.merges
    if earlier:
        raise UserError(
            f"a recipe of {len(recipe.merges)} merges is planned merge by merge, since later ones read what earlier ones make: write "
            f"merge {earlier[0].name} into a recipe of its own"
        )
    with _near(recipe, how) as here:
        work = _work(here.merges[0], output, {}, how)
        if isinstance(work, FileMerge):
            return plan_files(work, how)
        return plan_groups(work.groups, merge.technique, work.out, work.way, work.ids)


def _one(merge: Merge, output: Output, texts: Mapping[str, str], how: Execution) -> MergeReport:
    """Carry one merge out, whose models are paths."""
    work = _work(merge, output, texts, how)
    if isinstance(work, FileMerge):
        return merge_files(work, how)
    report = combine_groups(work.groups, work.about, work.out, work.way, work.ids)
    return replace(report, notes=(*work.notes, *report.notes))


@dataclass(frozen=True)
class _Grouped:
    """A merge whose tensors are not all made alike, ready to be carried out."""

    groups: Sequence[Group]
    about: Mapping[str, Any]
    out: Out
    way: Way
    ids: Mapping[Path, str]
    notes: Sequence[str]


def _work(merge: Merge, output: Output, texts: Mapping[str, str], how: Execution) -> FileMerge | _Grouped:
    """What a merge, whose models are paths, comes to."""
    dtype = output.dtype or merge.dtype
    for path in merge.models:
        if overwrites(output.out, Path(path)):
            raise UserError(f"--out {output.out} is one of the inputs and would be lost; give another --out")
    words = worded(merge)
    simple = None if words.rows or words.tokenizer or words.texts else _of_files(merge, output, texts)
    if simple is not None:
        return replace(simple, dtype=dtype)
    if any(one.statistics for one in merge.experts):
        raise UserError(
            "statistics belong to a merge of whole models; layers, parameters that differ between tensors, and other vocabularies cannot "
            "use them"
        )
    made = made_of(merge).over(words.rows)
    if how.workers > 1 or how.address:
        raise UserError(
            "layers, parameters that differ between tensors, and vocabularies are merged by one process; leave --workers out"
        )
    threads = how.threads or len(os.sched_getaffinity(0))
    way = Way(
        Running(threads, device=how.device), Rules(output.any_base or merge.any_base, merge.strip_prefix)
    )
    out = Out(
        output.out, bytes_of(how.shard_size) if how.shard_size else None,
        dtype=written(dtype) if dtype else None, texts={**words.texts, **texts}, changes={**made.changes, **words.changes},
        tokenizer=words.tokenizer,
    )  # fmt: skip
    ids = {Path(one.model): one.id for one in merge.experts if one.id}
    far = {path: with_slashes(str(absolute(path))) for path in merge.models if is_remote(absolute(path))}
    said = merge.with_models(far) if far else merge
    about = {"technique": merge.technique, "recipe": said.model_dump(exclude_defaults=True, mode="json")}
    return _Grouped(made.groups, about, out, way, ids, words.notes)


def _of_files(merge: Merge, output: Output, texts: Mapping[str, str]) -> FileMerge | None:
    """The merge of files that this is; None if tensors are treated differently."""
    chooser = Chooser(merge.technique, [merge.parameters], merge.experts)
    if (
        not merge.experts
        or not chooser.is_uniform
        or any(one.factor is not None or one.layers for one in merge.experts)
    ):
        return None
    operator, live = chooser.at("", 0.0, [""] * len(merge.experts))
    if not live:
        return None
    experts = [merge.experts[at] for at in live]
    return FileMerge(
        merge.technique,
        {name: value for name, value in operator.params.items() if value is not None},
        None if merge.base is None else Path(merge.base),
        [Path(one.model) for one in experts],
        output.out,
        ids=[one.id for one in experts],
        strip_prefix=merge.strip_prefix,
        statistics=[one.statistics for one in experts] if any(one.statistics for one in experts) else None,
        any_base=output.any_base or merge.any_base,
        texts=texts,
    )
