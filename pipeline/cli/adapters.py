"""The command that makes adapters, and what the others say about one.

Invariant: as for `pipeline.cli`, importing this module stays cheap.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import AsJson, Force, print_json

if TYPE_CHECKING:
    from merge_service.merging import Written

OutAdapter = Annotated[
    Path | None,
    typer.Option(
        "--out-adapter",
        metavar="DIR",
        help="In the place of --out: write the result as an adapter of the base. Without --rank it is exact: factors side by side, "
        "for adapters under a linear technique (average, task_arithmetic, lines_task_arithmetic).",
        show_default=False,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        metavar="R",
        help="With --out-adapter: the nearest adapter of this rank, for any technique and inputs; what it leaves out is said.",
        show_default=False,
    ),
]
Knots = Annotated[
    bool,
    typer.Option(
        "--knots",
        help="With --out-adapter: merge adapters in the singular directions that they share (KnOTS), by any technique; "
        "with ties it is KnOTS-TIES.",
    ),
]


def extract(
    finetuned: Annotated[
        Path, typer.Argument(metavar="FINETUNED", help="A model that was fine-tuned from the base.")
    ],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help="The model that it was trained from.")],
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="The rank of every matrix's factors.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder of the adapter, in the form of peft.")
    ],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter out of a fine-tuned model: the nearest one of a rank, for every matrix. Says what it leaves out.

    Norms, biases and other tensors that are no matrices of modules are not part of an adapter.

    Example: temporal-merge extract models/legal --base models/base --rank 16 --out adapters/legal
    """
    from pipeline.merging.adapters import extract_adapter

    show(extract_adapter(finetuned, base, rank, out, force), as_json)


def show(made: "Written", as_json: bool) -> None:
    """Say what was written."""
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print_json(
            {"out": str(made.out), "modules": made.modules, "rank": made.rank, "bytes": made.bytes, "residual": made.residual,
             "left_out": made.left_out, "without": list(made.without)}
        )  # fmt: skip
        return
    exact = made.residual == 0
    said = "exact" if exact else f"residual {made.residual:.4g} of the difference"
    print(
        f"{made.out}: an adapter of {made.modules} modules, rank {made.rank}, {made.bytes / 1e6:.2f} MB; {said}"
    )
    if made.without:
        more = f" and {len(made.without) - 1} more" if len(made.without) > 1 else ""
        print(f"not in an adapter: {made.without[0]}{more}, {made.left_out:.4g} of the difference")
