"""The commands to start with one's own data and model: import-data, init.

Invariant: importing this module stays cheap; a command imports what it needs when it is called.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, print_json

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A folder of class folders, a table of paths (CSV, TSV, JSON lines), or a Hugging Face dataset on disk (Arrow, Parquet).",
    ),
]
Root = Annotated[Path, typer.Option("--out", metavar="ROOT", help="The data root; made if it is not there.")]
DatasetName = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="The dataset's name; default SOURCE's.")
]
RoleNames = Annotated[
    list[str] | None,
    typer.Option(
        "--role",
        metavar="ROLE",
        help="adaptation (a task; default), held_out or pretraining; may be repeated.",
    ),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        help="A prompt with {c} for the class name; may be repeated. Default 'a photo of a {c}.'",
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        "--classnames",
        metavar="FILE",
        help="YAML of `label: name`, where labels are no words that a prompt can hold.",
    ),
]
ValShare = Annotated[
    float | None,
    typer.Option("--val", metavar="SHARE", help="Of each class, where SOURCE has no val; default 0.1."),
]
TestShare = Annotated[
    float | None,
    typer.Option("--test", metavar="SHARE", help="Of each class, where SOURCE has no test; default 0.2."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Draws what becomes val and test.")]
Equal = Annotated[
    str,
    typer.Option(
        "--equal",
        metavar="refuse|drop",
        help="A picture that two splits of SOURCE show: refuse, or keep it in test (val) only.",
    ),
]
Unreadable = Annotated[
    str,
    typer.Option(
        "--unreadable",
        metavar="refuse|drop",
        help="Pictures that cannot be read: refuse, or leave them out.",
    ),
]
Column = Annotated[
    str | None, typer.Option(metavar="NAME", help="Its column, where the usual names do not find it.")
]


def import_data(
    source: Source,
    out: Root,
    name: DatasetName = None,
    role: RoleNames = None,
    template: Templates = None,
    classnames: ClassNames = None,
    val: ValShare = None,
    test: TestShare = None,
    seed: Seed = 0,
    equal: Equal = "refuse",
    unreadable: Unreadable = "refuse",
    image_column: Column = None,
    label_column: Column = None,
    caption_column: Column = None,
    split_column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Make a dataset of a data root out of pictures: WebDataset shards, class names, prompts, and its role in ROOT/suite.json.

    Every picture is looked at, and each that cannot be read is named. The dataset is written whole or not at all; the same source gives the
    same bytes. Equal pictures stay in one split.

    Example: temporal-merge import-data photos/signals --out my_data --template "a sign that says {c}"
    """
    from workers.data.importing import import_data as write
    from workers.data.importing import order_of

    order = order_of(
        source, name=name, role=role, template=template, classnames=classnames, val=val, test=test, seed=seed, equal=equal,
        unreadable=unreadable, image_column=image_column, label_column=label_column, caption_column=caption_column,
        split_column=split_column,
    )  # fmt: skip
    made = write(order, out, lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print_json({**asdict(made), "root": str(made.root)})
        return
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    counts = ", ".join(f"{count:,} {split}" for split, count in made.samples.items())
    what = f"{made.classes} classes" if made.classes else made.kind
    state = "written" if made.written else "there already"
    print(f"{made.root / made.name}: {state}: {what}, {counts}; role {', '.join(made.roles)}")


def init(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file to write.")],
    data: Annotated[
        Path, typer.Option("--data", metavar="ROOT", help="A data root, as `import-data` makes one.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="NAME|DIR|FILE|hf-hub:REPO", help="The base, as `model.config` of a study."
        ),
    ],
    pretrained: Annotated[
        str | None,
        typer.Option(
            "--pretrained",
            metavar="TAG|DIR|FILE",
            help="Its weights; default: those of a directory or repository.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace STUDY.yaml.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a first study for a data root and a model, with comments; `plan` and `run` take it as it is.

    Example: temporal-merge init mine.yaml --data my_data --model ViT-B-32 --pretrained laion2b_s34b_b79k
    """
    from pipeline.plan.starter import write_starter

    of, notes = write_starter(study, data, (model, pretrained), force)
    if as_json:
        print_json({"study": str(study), "roles": of.roles, "notes": notes})
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{study}: {of}\nnext: temporal-merge plan {study}")
