"""The arguments and options that several commands share, each with its help.

Invariant: as for `pipeline.cli`, importing this module stays cheap.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

StudyFile = Annotated[
    Path, typer.Argument(metavar="STUDY.yaml", help="A study file, e.g. configs/demo.yaml.")
]
OutDir = Annotated[Path, typer.Argument(metavar="OUT", help="The directory of a run, e.g. runs/demo.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="key.path=value", help="Change one value of the study; may be repeated."),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Where everything goes; default runs/NAME, by the study's name."
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--shard-size",
        metavar="SIZE",
        help="Write a model above SIZE (5GB, 500MB; decimal) as Hugging Face does: NAME-00001-of-0000N.safetensors of at "
        "most SIZE and NAME.safetensors.index.json; a smaller one stays one file. An --out that ends in "
        ".safetensors.index.json always writes the index, in shards of 5GB by default.",
    ),
]
KeepThresholds = Annotated[
    bool,
    typer.Option(
        "--keep-thresholds/--no-keep-thresholds",
        help="Keep the thresholds of TIES or Breadcrumbs beside each expert (EXPERT.limits.json), so that the next merge "
        "of it need not find them. Kept ones that fit are always used; the result is the same.",
    ),
]
MergedOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="The merged checkpoint: NAME.safetensors, NAME.safetensors.index.json for shards, or a directory when the "
        "inputs are directories of open_clip, transformers or diffusers: it then holds all that they open it with.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16|float16",
        help="The type of the floats in the output; by default the base's. They are rounded to it once.",
        show_default=False,
    ),
]
AsStudy = Annotated[
    bool,
    typer.Option(
        "--as-study",
        help="Name the experts t1, t2, ... and record no file names: the file that a study or a live service makes of them, "
        "to the byte.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
PlanOnly = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Write nothing: print what the merge will read, write and need (bytes, passes, memory, disk, shards, seconds), from headers "
        "alone.",
    ),
]
Compare = Annotated[
    bool | None,
    typer.Option(
        "--compare/--no-compare",
        help="Say how the task vectors lie: norms, cosines, sign conflicts. It reads every checkpoint twice more, so by default "
        "only up to 4 GB of them.",
        show_default=False,
    ),
]
Base = Annotated[
    Path | None, typer.Option("--base", metavar="FILE", help="The checkpoint that the experts started from.")
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="p=v", help="A parameter of the technique; may be repeated."),
]
Parity = Annotated[
    str | None,
    typer.Option(
        "--parity",
        metavar="fomo_in_flux",
        help="Merge as the authors of TIME do (FoMo-in-Flux v1.0) where they differ; --set is then in their terms.",
    ),
]
Named = Annotated[
    list[str] | None,
    typer.Option(
        "--id",
        metavar="NAME=FILE",
        help="Name an expert, for messages, the output's metadata and the seed of its random masks; may be repeated. "
        "By default its name comes from its content, so that the order of files changes no mask.",
    ),
]
StripPrefix = Annotated[
    str | None,
    typer.Option(
        "--strip-prefix",
        metavar="PREFIX",
        help="Remove this from every tensor name that begins with it, e.g. module. ; a prefix that all names of one "
        "file have, and no other file's, is removed automatically.",
    ),
]
AnyBase = Annotated[
    bool,
    typer.Option("--any-base", help="Also merge experts that cannot have been trained from the base."),
]
Measurements = Annotated[
    list[Path] | None,
    typer.Option(
        "--statistics",
        metavar="FILE",
        help="What was measured of an expert (see `measure`), once per expert, in the order of the experts. By default "
        "EXPERT.KIND.safetensors beside each, for a technique that needs it.",
    ),
]
Coefficients = Annotated[
    Path | None,
    typer.Option(
        "--coefficients",
        metavar="FILE",
        help="Factors of task vectors by tensor name or pattern, one per expert: a .safetensors file with tensors [N], or YAML or "
        "JSON with lists. For techniques that have the parameter.",
    ),
]
LearningParameters = Annotated[
    list[str] | None,
    typer.Option(
        "--param", metavar="p=v", help="A parameter of the method (steps, start, ...); may be repeated."
    ),
]
WarmStart = Annotated[
    Path | None,
    typer.Option(
        "--warm-start",
        metavar="FILE",
        help="Coefficients learned before: experts that they know begin with theirs.",
    ),
]
AdaptOnTest = Annotated[
    bool,
    typer.Option(
        "--adapt-on-test",
        help="Learn on the unlabelled test images, as published; the file and every merge with it are marked.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="By default one per CPU, or one per worker with --workers. Does not change the result.",
        show_default=False,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", min=1, help="Ray workers to divide the tensors among. Does not change the result."
    ),
]
WorkersAddress = Annotated[
    str | None,
    typer.Option("--address", metavar="local|auto|HOST:PORT", help="Where workers run; default local."),
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="A torch device such as cuda or cuda:1 that merges the blocks; by default compiled loops on the CPU do.",
    ),
]
Modules = Annotated[
    list[Path] | None,
    typer.Option(
        "--module",
        metavar="FILE.py",
        help="A Python file that declares techniques of your own; it is run. May be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON and nothing else.")]

Dashboard = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="http://HEAD:8265",
        help="The dashboard of the cluster's head.",
        show_default=False,
    ),
]


def use_modules(files: list[Path] | None) -> None:
    """Register the techniques of the files given with --module. Raises TechniqueError."""
    if files:
        from merge_service.techniques import use_file

        for file in files:
            use_file(file)


def print_json(answer: Any) -> None:
    """Print the answer of a command as one JSON value on stdout."""
    print(json.dumps(answer, indent=2))
