"""The commands about files: checkpoints, techniques, data roots.

Invariant: importing this stays cheap; what a command needs is imported when it is called.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import (
    AnyBase,
    AsJson,
    Base,
    DeviceName,
    KeepThresholds,
    MergedOut,
    Named,
    Overrides,
    Parameters,
    Parity,
    ShardSize,
    StripPrefix,
    Threads,
    Workers,
    WorkersAddress,
    print_json,
)


def technique_names(begun: str) -> list[str]:
    """Techniques whose names begin so, for the shell's completion."""
    from merge_service.techniques import names

    return [name for name in names() if name.startswith(begun)]


def merge(
    experts: Annotated[list[Path], typer.Argument(metavar="EXPERT...", help="Checkpoints, oldest first.")],
    technique: Annotated[
        str,
        typer.Option("--technique", metavar="NAME", help="See `techniques`.", autocompletion=technique_names),
    ],
    out: MergedOut,
    base: Base = None,
    overrides: Parameters = None,
    parity: Parity = None,
    named: Named = None,
    strip_prefix: StripPrefix = None,
    any_base: AnyBase = False,
    threads: Threads = None,
    workers: Workers = 1,
    address: WorkersAddress = None,
    device: DeviceName = None,
    shard_size: ShardSize = None,
    keep_thresholds: KeepThresholds = False,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints on disk; no study, and no cluster unless asked for. Memory does not grow with their number.

    With --workers or --address Ray workers merge, each its part of the tensors: all files must be on storage they share.
    A checkpoint is a .safetensors file, a sharded *.safetensors.index.json, or a directory holding either.

    Example: temporal-merge merge --technique ties --base base.safetensors --set density=0.2 --out m.safetensors a.safetensors b.safetensors
    """
    from merge_service.anatomy import described
    from pipeline.api import ids_from, merge_files
    from pipeline.show import parameters_from

    report = merge_files(
        technique,
        parameters_from(overrides or []),
        base,
        experts,
        out,
        parity=parity,
        ids=ids_from(named or [], experts),
        strip_prefix=strip_prefix,
        any_base=any_base,
        threads=threads,
        workers=workers,
        address=address,
        device=device,
        shard_size=shard_size,
        keep_thresholds=keep_thresholds,
    )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if any(report.stacks.values()) and not as_json:
        print(f"towers: {described(report.stacks)}")
    answer = {
        "out": str(report.out),
        "technique": technique,
        "experts": len(experts),
        "inputs": report.inputs,
        "seconds": round(report.seconds, 3),
        **({"towers": report.stacks} if report.stacks else {}),
    }
    print_json(answer) if as_json else print(
        f"{report.out}: {technique} of {len(experts)} checkpoints in {report.seconds:.2f} s"
    )


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A weights directory or a .safetensors file.")
    ],
    study: Annotated[
        Path, typer.Option("--study", metavar="STUDY.yaml", help="Says which data and which model.")
    ],
    datasets: Annotated[
        str | None, typer.Option("--datasets", metavar="a,b", help="Default: all that the study scores.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="test|val", help="Default: the study's evaluation.split."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score one checkpoint exactly as a run would: zero-shot top-1, retrieval recall@5, KA, ZS and GM.

    Example: temporal-merge evaluate merged.safetensors --study configs/demo.yaml
    """
    from pipeline.evaluation import evaluate_checkpoint
    from pipeline.show import show_scores

    names = [name.strip() for name in datasets.split(",") if name.strip()] if datasets else None
    answer = evaluate_checkpoint(checkpoint, study, overrides or [], names, split)
    for note in answer["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print_json(answer) if as_json else show_scores(answer)


def techniques(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One technique in full.", autocompletion=technique_names),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the merging techniques, or explain one: formula, parameters, needs, forms, paper.

    Example: temporal-merge techniques ties
    """
    from pipeline.show import show_techniques, techniques_as_json

    print_json(techniques_as_json(name)) if as_json else show_techniques(name)


def check(
    suite: Annotated[
        Path,
        typer.Argument(metavar="SUITE.yaml", help="A suite file, e.g. configs/fomo_in_flux/datasets.yaml."),
    ],
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="The folder that holds the datasets.")],
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Read every shard whole and decode every picture, not only manifests."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which datasets of a suite are there, which are missing or wrong, and what to do about each.

    Ends with code 2 while something is missing or wrong. Example: temporal-merge check configs/fomo_in_flux/datasets.yaml --root /data/fomo_in_flux
    """
    from pipeline.suites import check as check_root
    from pipeline.suites import read_suite_file, summary

    asked = read_suite_file(suite)
    answer = summary(asked, root, check_root(asked, root, deep))
    if as_json:
        print_json(answer)
    else:
        for finding in answer["findings"]:
            print(f"{finding['what']:8} {finding['dataset']} ({finding['role']}): {finding['text']}")
        unread = "" if deep else "; samples were not looked at (--deep)"
        print(
            f"{root}: {answer['usable']} of {answer['datasets']} datasets of {asked.name} are ready{unread}"
        )
    if not answer["complete"]:
        raise typer.Exit(2)
