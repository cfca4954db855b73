"""The commands that make checkpoints, or say how: merge, recipe, convert.

Invariant: as for `pipeline.cli`, importing this module stays cheap.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_service.errors import UserError
from pipeline.cli.adapters import Knots, OutAdapter, Rank, show
from pipeline.cli.options import (
    AdaptOnTest,
    AnyBase,
    AsJson,
    AsStudy,
    Base,
    Coefficients,
    Compare,
    DeviceName,
    Dtype,
    Force,
    KeepThresholds,
    LearningParameters,
    Measurements,
    MergedOut,
    Modules,
    Named,
    Overrides,
    Parameters,
    Parity,
    PlanOnly,
    ShardSize,
    StripPrefix,
    Threads,
    WarmStart,
    Workers,
    WorkersAddress,
    print_json,
    use_modules,
)

if TYPE_CHECKING:
    from merge_service.merge import MergeReport
    from pipeline.merging.files import Execution

_YAML = (".yaml", ".yml")


def technique_names(begun: str) -> list[str]:
    """Techniques whose names begin with `begun`, for the shell's completion."""
    from merge_service.techniques import names

    return [name for name in names() if name.startswith(begun)]


Experts = Annotated[
    list[Path],
    typer.Argument(
        metavar="EXPERT...",
        help="Checkpoints, oldest first, also hf://OWNER/NAME and s3://BUCKET/FOLDER; or one recipe (FILE.yaml), ours or mergekit's.",
    ),
]
TechniqueName = Annotated[
    str | None,
    typer.Option(
        "--technique",
        metavar="NAME",
        help="See `techniques`; a recipe names its own.",
        show_default=False,
        autocompletion=technique_names,
    ),
]


def merge(
    experts: Experts,
    out: MergedOut = None,
    technique: TechniqueName = None,
    base: Base = None,
    overrides: Parameters = None,
    parity: Parity = None,
    named: Named = None,
    strip_prefix: StripPrefix = None,
    any_base: AnyBase = False,
    statistics: Measurements = None,
    coefficients: Coefficients = None,
    dtype: Dtype = None,
    threads: Threads = None,
    workers: Workers = 1,
    address: WorkersAddress = None,
    device: DeviceName = None,
    shard_size: ShardSize = None,
    out_adapter: OutAdapter = None,
    rank: Rank = None,
    knots: Knots = False,
    keep_thresholds: KeepThresholds = False,
    modules: Modules = None,
    as_study: AsStudy = False,
    force: Force = False,
    compare: Compare = None,
    plan: PlanOnly = False,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints on disk; no study, and no cluster unless asked for. Memory does not grow with their number.

    With --workers or --address Ray workers merge, each its part of the tensors: all files must be on storage they share.
    A checkpoint is a .safetensors file, a sharded *.safetensors.index.json, or a directory holding either.
    A recipe says everything else in a file: models, weights, layers, parameters, dtype; mergekit's are taken as they are.

    Example: temporal-merge merge --technique ties --base base.safetensors --set density=0.2 --out m.safetensors a.safetensors b.safetensors
    """
    from pipeline.cli.show_files import parameters_from, show_plan
    from pipeline.merging.adapters import merge_to_adapter
    from pipeline.merging.compare import compared
    from pipeline.merging.files import Execution, FileMerge, ids_from, merge_files, nearby
    from pipeline.merging.planning import plan_files
    from pipeline.recipes.of_files import with_texts

    use_modules(modules)
    how = Execution(threads, workers, address, device, shard_size, keep_thresholds)
    place = _place(out, out_adapter, "--rank" if rank is not None else "--knots" if knots else None, plan)
    if technique is None:
        given = {
            "--base": base, "--set": overrides, "--parity": parity, "--id": named, "--strip-prefix": strip_prefix,
            "--statistics": statistics, "--coefficients": coefficients, "--as-study": as_study, "--out-adapter": out_adapter, "--knots": knots,
        }  # fmt: skip
        beside = {option for option, value in given.items() if value}
        _by_recipe(experts, beside, (place, force, dtype, any_base), how, (plan, as_json))
        return
    params = parameters_from(overrides or []) | ({"coefficients": coefficients} if coefficients else {})
    what = FileMerge(
        technique, params, base, experts, place,
        parity, ids_from(named or [], experts), strip_prefix, any_base, statistics, force, dtype, as_study=as_study,
    )  # fmt: skip
    with nearby(what, how) as what:
        if plan:
            show_plan(plan_files(with_texts(what), how, compare), as_json)
        elif out_adapter is not None:
            show(merge_to_adapter(what, rank, how, knots), as_json)
        else:
            report = merge_files(with_texts(what), how)
            found, why = compared(what, report.out or place, compare)
            _answer(report, as_json, found, why)


def _place(out: Path | None, adapter: Path | None, option: str | None, plan: bool) -> Path:
    """Where the result goes. Raises UserError unless it is exactly one of the two."""
    if plan and adapter is not None:
        raise UserError("--plan is of whole models; an adapter has some MB, so merge it without a plan")
    if adapter is None and option is not None:
        raise UserError(f"{option} is of an adapter; give --out-adapter DIR with it")
    if out is None and adapter is None:
        raise typer.BadParameter("Missing; give it, or --out-adapter", param_hint="--out")
    if out is not None and adapter is not None:
        raise UserError("give --out for the whole model or --out-adapter for an adapter, not both")
    found = out or adapter
    assert found is not None
    return found


def learn(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD", help="adamerging, supermerge, dam, concrete, concrete_safe or tinting."
        ),
    ],
    experts: Annotated[
        list[Path], typer.Argument(metavar="EXPERT...", help="Checkpoints, in the order of the merge.")
    ],
    base: Annotated[
        Path, typer.Option("--base", metavar="FILE", help="The checkpoint that the experts started from.")
    ],
    study: Annotated[
        Path, typer.Option("--study", metavar="STUDY.yaml", help="Says which data and which model.")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="a,b",
            help="The tasks whose training splits are used; for dam and tinting those of the experts, in their order.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file of coefficients.")],
    params: LearningParameters = None,
    warm_start: WarmStart = None,
    adapt_on_test: AdaptOnTest = False,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="A torch device such as cuda.")
    ] = "cpu",
    overrides: Overrides = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Learn the coefficients of a merge on images of its tasks; then merge with --coefficients FILE.

    Without labels (supermerge: with labels), on the training splits. Run it again after an interruption: it goes on, to the bit.

    Example: temporal-merge learn adamerging e1.safetensors e2.safetensors --base base.safetensors --study s.yaml --tasks animals,flowers --out c.safetensors
    """
    from pipeline.cli.show_files import parameters_from
    from pipeline.merging.learning import OfTasks, learn_tasks, listed
    from pipeline.study.config import load_study
    from workers.learning.wanted import Wanted

    if out.exists() and not force:
        raise UserError(f"--out {out} is there already; give another --out, or replace it with --force")
    given = {**parameters_from(params or []), "device": device}
    if adapt_on_test:
        given["adapted_on"] = "test"
    wanted = Wanted.of(method, given)
    what = OfTasks(experts, base, load_study(study, overrides or []), listed(tasks), out, warm_start)
    found = learn_tasks(wanted, what)
    losses = found.losses
    answer = {"out": str(out), "method": method, "technique": found.about.technique, "experts": len(experts), "steps": len(losses),
              "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
              "adapted_on": wanted.adapted_on}  # fmt: skip
    if as_json:
        print_json(answer)
        return
    moved = f", loss {losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""
    on = "; on TEST images: scores on them are those of test-time adaptation" * adapt_on_test
    print(f"{out}: {len(found)} coefficients of {len(experts)} experts after {len(losses)} steps{moved}{on}")


def _by_recipe(
    files: list[Path],
    given: set[str],
    output: tuple[Path, bool, str | None, bool],
    how: "Execution",
    answer: tuple[bool, bool],
) -> None:
    """Carry out or plan the one recipe among `files`; `answer`: whether it is planned only, and printed as JSON. Raises UserError if there is
    none, or an option beside it that belongs into it."""
    if len(files) != 1 or files[0].suffix not in _YAML:
        raise typer.BadParameter(
            "Missing; give it, or one recipe (FILE.yaml) in the place of checkpoints",
            param_hint="--technique",
        )
    if given:
        raise UserError(f"{min(given)} cannot be given beside a recipe; write it into {files[0]}")
    from pipeline.recipes.carry_out import Output, merge_recipe, plan_recipe
    from pipeline.recipes.read import read_recipe

    read = read_recipe(files[0])
    _note(read.notes)
    only_plan, as_json = answer
    if only_plan:
        from pipeline.cli.show_files import show_plan

        show_plan(plan_recipe(read.recipe, Output(*output), how), as_json)
    else:
        _answer(merge_recipe(read.recipe, Output(*output), how), as_json)


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _answer(report: "MergeReport", as_json: bool, found: Any = None, why: str = "") -> None:
    from merge_service.anatomy import described
    from pipeline.cli.show_files import show_comparison

    _note((*report.notes, *([why] if why else [])))
    if any(report.stacks.values()) and not as_json:
        print(f"towers: {described(report.stacks)}")
    answer = {
        "out": str(report.out),
        "technique": report.technique,
        "experts": report.experts,
        "inputs": report.inputs,
        "seconds": round(report.seconds, 3),
        **({"towers": report.stacks} if report.stacks else {}),
        **({"comparison": found.to_json()} if found else {}),
    }
    if as_json:
        print_json(answer)
        return
    print(f"{report.out}: {report.technique} of {report.experts} checkpoints in {report.seconds:.2f} s")
    if found:
        show_comparison(found)


def recipe(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A recipe, ours or mergekit's.")],
    language: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="mergekit",
            help="The language of the file; by default its keys tell.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a merge recipe and print it in our own terms; nothing is read but the file, and nothing is merged.

    Example: temporal-merge recipe --from mergekit mergekit_config.yml
    """
    from pipeline.recipes.read import read_recipe

    read = read_recipe(file, language)
    _note(read.notes)
    if as_json:
        print_json(
            {"merges": [one.model_dump(exclude_defaults=True, mode="json") for one in read.recipe.merges]}
        )
    else:
        print(read.recipe.to_yaml(), end="")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A .pt, .pth, .bin or .ckpt file of torch, an index of such shards, or a directory with one.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="NAME.safetensors, or a directory if IN has a config.json beside it."
        ),
    ],
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="a.b",
            help="Where the state dict is in what was saved, if not under a usual name.",
            show_default=False,
        ),
    ] = None,
    strip_prefix: StripPrefix = None,
    shard_size: ShardSize = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a pickled checkpoint as safetensors. Nothing in it is run: only tensors and dictionaries are read, all else is refused.

    Folders of torch.distributed.checkpoint (FSDP, torchtitan) and of DeepSpeed's ZeRO are put together, tensor by tensor.

    Example: temporal-merge convert pytorch_model.bin model.safetensors
    """
    from merge_service.checkpoints import bytes_of
    from merge_service.checkpoints import convert as converted
    from pipeline.merging.files import refuse_to_replace

    if not force:
        refuse_to_replace(out)
    made = converted(source, out, key, strip_prefix, bytes_of(shard_size) if shard_size else None)
    _note(made.notes)
    if as_json:
        print_json({"out": str(made.out), "tensors": made.tensors, "ties": dict(made.ties)})
    else:
        print(f"{made.out}: {made.tensors} tensors")
