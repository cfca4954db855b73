"""`python -m workers.pretrain RECIPE --out DIR` makes a base checkpoint from its recipe."""

import argparse
import sys
from pathlib import Path

from merge_service.errors import UserError
from workers.pretrain.base import pretrain
from workers.pretrain.page import table


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.pretrain", description="Make a base checkpoint from its recipe."
    )
    parser.add_argument("recipe", type=Path, help="recipe.yaml beside an open_clip_config.json")
    parser.add_argument(
        "--out", type=Path, required=True, help="where to write the weights directory and its scores"
    )
    parser.add_argument("--root", help="the data root to train on (default: that of the recipe)")
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of the initial weights, the copies and the batches (default: that of the recipe)",
    )
    options = parser.parse_args(arguments)
    try:
        result = pretrain(options.recipe, options.out, options.root, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
