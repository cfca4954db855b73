"""The command that averages the checkpoints of one training run.

Invariant: as for `pipeline.cli`, importing this module stays cheap.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_service.errors import UserError
from pipeline.cli.options import AsJson, Dtype, Overrides, ShardSize, Threads, print_json

if TYPE_CHECKING:
    from pipeline.merging.along import Averaged


Scored = Annotated[
    Path | None,
    typer.Option(
        "--study",
        metavar="STUDY.yaml",
        help="Score every average and the last checkpoint on this study's data.",
    ),
]
Split = Annotated[
    str | None,
    typer.Option("--split", metavar="test|val", help="Default: the study's evaluation.split."),
]


def trajectory(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CKPT...",
            help="Checkpoints of one run. They are taken by the step in their names (the last number), else as given.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="A directory; each average is a file or folder in it."),
    ],
    windows: Annotated[
        str, typer.Option("--windows", metavar="N,N", help="How many of the last checkpoints are averaged.")
    ] = "4,8,16",
    shapes: Annotated[
        str,
        typer.Option(
            "--shapes",
            metavar="NAME,NAME",
            help="Of mean, linear, 1-sqrt, cosine, ema, ema:0.2 (the newest one's share).",
        ),
    ] = "mean,linear,1-sqrt,ema",
    every: Annotated[
        bool,
        typer.Option(
            "--every",
            help="Averages that end at every checkpoint at which a window is full, not only at the last.",
        ),
    ] = False,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    threads: Threads = None,
    study: Scored = None,
    split: Split = None,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace averages of other checkpoints at --out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Average the last checkpoints of one training run, by several windows and shapes of weights, in one pass over them.

    Memory is a block of each checkpoint. The same command after a crash goes on with the first file that is missing.

    Example: temporal-merge trajectory run/checkpoint-* --windows 2,4 --shapes mean,1-sqrt --out averages
    """
    from pipeline.merging.along import Along, merge_along

    names = [name.strip() for name in shapes.split(",") if name.strip()]
    what = Along(checkpoints, out, _numbers(windows), names, every, dtype, shard_size, force)
    if study is None and (split or overrides):
        raise UserError("--split and --set are about scores; give --study too")
    found = merge_along(what, threads)
    for note in found.made.notes:
        print(f"note: {note}", file=sys.stderr)
    scores = _scores(found, study, split, overrides or []) if study is not None else {}
    if as_json:
        print_json({**found.record, "written": found.made.written, "kept": found.made.kept, "scores": scores})
    else:
        _show(found, scores)


def _numbers(text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",") if one.strip()]
    except ValueError:
        raise UserError(f"--windows {text!r}: write numbers of checkpoints, e.g. --windows 4,8,16") from None


def _scores(found: "Averaged", study: Path, split: str | None, overrides: list[str]) -> dict[str, Any]:
    """KA, ZS and GM of the last checkpoint and of every average, by name."""
    from pipeline.run.evaluation import score
    from pipeline.study.config import load_study

    chosen = load_study(study, overrides)
    last = Path(found.record["checkpoints"][-1]["path"])
    models = {last.name: last, **found.made.paths}
    answers = {name: score(path, chosen, None, split) for name, path in models.items()}
    return {
        name: {key: one.get(key) for key in ("ka", "zs", "gm", "scores")} for name, one in answers.items()
    }


def _show(found: "Averaged", scores: dict[str, Any]) -> None:
    from pipeline.cli.show_files import new_table
    from pipeline.console import console as made_console

    made = found.made
    table = new_table("averages", "name", "checkpoints", *(("KA", "ZS", "GM") if scores else ()))
    rows = {one.name: str(one.window) for one in found.averages}
    for name in scores or rows:
        one = scores.get(name, {})
        numbers = (
            [f"{one[key]:.4f}" if one.get(key) is not None else "" for key in ("ka", "zs", "gm")]
            if scores
            else []
        )
        table.add_row(name, rows.get(name, "1"), *numbers)
    made_console().print(table)
    kept = f", {made.kept} kept" if made.kept else ""
    print(
        f"{made.written} files written{kept} from one pass over {made.checkpoints} checkpoints in {made.seconds:.2f} s"
    )
