"""`python -m pipeline.claims.when_ema`: run pieces of the study, keep their numbers, judge them, write the page.

Invariant: finished pieces are not run again; the page is made from the kept numbers alone, whatever was run here.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from merge_service.errors import UserError
from pipeline.claims.programs import exit_code, run_as_program
from pipeline.claims.when_ema import numbers
from pipeline.claims.when_ema.design import Design, Piece, cost_of, read_design
from pipeline.claims.when_ema.pieces import Places, carry_out, make_bases

DESIGN = Path("configs/studies/when_ema/pieces.yaml")
PAGE = Path("docs/when_ema.md")
CHOOSING = Path("docs/choosing.md")
NUMBERS = Path("docs/when_ema/numbers")
WORK = Path("runs/when_ema")


def run(pieces: Sequence[Piece], design: Design, places: Places, minutes: float) -> list[str]:
    """Run the unfinished pieces until `minutes` are over; returns a line on what is left."""
    began = time.monotonic()
    ahead = [piece for piece in pieces if not numbers.has(places.kept, piece)]
    took = 0.0
    for place, piece in enumerate(ahead):
        passed = (time.monotonic() - began) / 60
        if passed + took > minutes:
            return [f"{len(ahead) - place} pieces are left; give the same command again to go on"]
        make_bases(ahead[place:], design, places)
        started = time.monotonic()
        carry_out(piece, design, places)
        took = max(took, (time.monotonic() - started) / 60)
    return []


def estimate(pieces: Sequence[Piece], design: Design, kept: Path) -> list[str]:
    """A line per unfinished piece with its cost by its plan, and their sum with the bases that they need."""
    lines, total, known = [], 0.0, {}
    ahead = [piece for piece in pieces if not numbers.has(kept, piece)]
    for piece in ahead:
        if piece.name not in known:
            known[piece.name] = cost_of(piece, design)
        cost = known[piece.name]
        minutes = cost.minutes(design.cost)
        total += minutes
        lines.append(
            f"{piece.key}: {cost.steps:,} steps of training, {cost.evaluations:,} evaluations, {cost.merges:,} merges: {minutes:.1f} minutes"
        )
    bases = {(piece.model, piece.replicate) for piece in ahead}
    total += sum(design.cost["base"][model] for model, _ in bases) / 60 / 2
    return [*lines, f"{len(ahead)} pieces and {len(bases)} bases: {total:.0f} minutes on two cores"]


def judged(page: Path, found: numbers.Numbers, design: Design) -> list[str]:
    """Write the page, and its advice where the page on choosing repeats it; returns a line per hypothesis, or one on what is missing while no replicate is complete."""
    from pipeline.claims.when_ema.measures import whole
    from pipeline.claims.when_ema.page import with_advice, write

    if not whole(found, design.core):
        return [f"no replicate has all of {', '.join(design.core)} yet, so there is no page"]
    lines = write(page, found, design)
    if page == PAGE:
        text = with_advice(CHOOSING.read_text(encoding="utf-8"), page.read_text(encoding="utf-8"))
        CHOOSING.write_text(text, encoding="utf-8")
    return [*lines, f"page: {page}"]


def numbered(text: str) -> list[int]:
    """0,1,2 or 0-3 as numbers."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 on a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.claims.when_ema", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--replicates", type=numbered, help="such as 0,1 or 0-3 (default: all that the pieces have)"
    )
    parser.add_argument("--pieces", type=lambda text: text.split(","), help="names (default: the core)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no piece that may not end by then")
    parser.add_argument(
        "--estimate", action="store_true", help="say what is left to run and how long it takes"
    )
    parser.add_argument("--no-run", action="store_true", help="judge what is there")
    parser.add_argument("--design", type=Path, default=DESIGN, help="the pieces (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="where runs and bases lie (default: %(default)s)"
    )
    parser.add_argument(
        "--numbers", type=Path, default=NUMBERS, help="where numbers are kept (default: %(default)s)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="what to write (default: %(default)s)")
    parser.add_argument(
        "--set",
        dest="extra",
        action="append",
        default=[],
        help="key.path=value for every run; needs --numbers of its own",
    )
    parser.add_argument("--keep-runs", action="store_true", help="leave runs and their stores where they are")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _answer(options))


def _answer(options: argparse.Namespace) -> list[str]:
    """Carry out the options; returns the lines to print. Raises UserError."""
    design = read_design(options.design)
    pieces = design.chosen(options.replicates, options.pieces)
    if options.estimate:
        return estimate(pieces, design, options.numbers)
    if options.extra and options.numbers == NUMBERS:
        raise UserError(
            f"--set makes another study; give --numbers, so that its numbers do not mix with {NUMBERS}"
        )
    places = Places(options.work, options.numbers, tuple(options.extra), options.keep_runs)
    left = [] if options.no_run else run(pieces, design, places, options.minutes)
    return [*left, *judged(options.page, numbers.read_numbers(options.numbers), design)]


if __name__ == "__main__":
    sys.exit(run_as_program(main))
