"""`python -m pipeline.claims`: run the studies of a reproduction, keep their rows, judge the claims, write the page.

There are three stages, each of which can run separately:

- the tuning studies give the parameters of all others (`tuned.yaml`)
- every study gives its rows (a CSV file each)
- rows and parameters alone give verdicts, page, figures and tables

Invariant: studies run through the public command line, so each resumes where it stopped; a quick reproduction replaces no
committed file.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from merge_service.errors import UserError
from pipeline.claims.claims import claims_of
from pipeline.claims.contrasts import STUDIES as STUDY_NAMES
from pipeline.claims.figures import draw_all
from pipeline.claims.judge import Judged, judge, plain
from pipeline.claims.page import About, effect, page
from pipeline.claims.programs import (
    commit,
    exit_code,
    run_as_program,
    run_programs,
    study_program,
    study_words,
)
from pipeline.claims.results import CELL, METRICS, Findings, read_rows, read_run, write_rows
from pipeline.claims.tuning import TUNING, Tuned, read_tuned, strangers, tune, with_parameters, write_tuned

STUDIES = Path("configs/studies/time_claims")
PAGE = Path("docs/reproduction.md")
DATA, ROWS = "reproduction", "rows"
NAMES = (*TUNING, *STUDY_NAMES)


@dataclass(frozen=True)
class Places:
    """Where studies run (`out`), the page to write (`page`, with a folder beside it), and the file of parameters."""

    out: Path
    page: Path
    tuned: Path = STUDIES / "tuned.yaml"

    @property
    def data(self) -> Path:
        return self.page.parent / DATA

    @property
    def rows(self) -> Path:
        return self.data / ROWS


def run_studies(names: Sequence[str], places: Places, quick: bool) -> None:
    """Stages 1 and 2: run each study and keep its rows; write the parameters as soon as all tuning rows exist. Raises UserError."""
    plan = read_plan()
    for name in names:
        settings = overrides(name, places.tuned, plan["quick"].get(name, []) if quick else [])
        run_programs(study_program(f"study {name}", file_of(name), places.out / name, settings))
        write_rows(places.rows, read_run(places.out / name, name, commit(STUDIES / "tuned.yaml")))
        if name in TUNING and not quick and all((places.rows / f"{one}.csv").is_file() for one in TUNING):
            write_tuned(places.tuned, tune(read_rows(places.rows, TUNING)))


def read_plan() -> dict[str, Any]:
    """`reproduce.yaml`."""
    answer: dict[str, Any] = yaml.safe_load((STUDIES / "reproduce.yaml").read_text(encoding="utf-8"))
    return answer


def file_of(name: str) -> Path:
    """The file of a study."""
    return STUDIES / f"{name}.yaml"


def overrides(name: str, tuned: Path, more: Sequence[str] = ()) -> list[str]:
    """The values of `--set` for a study: its strategies with the tuned parameters, and `more`."""
    if name in TUNING:
        return list(more)
    study = yaml.safe_load(file_of(name).read_text(encoding="utf-8"))
    return [f"grid.strategies={json.dumps(with_parameters(study, read_tuned(tuned)))}", *more]


def judge_rows(places: Places) -> tuple[tuple[Judged, ...], Findings, Tuned]:
    """Stage 3 without writing. Raises UserError if rows are missing, do not belong together, or have parameters that were not
    chosen.
    """
    found, tuned = read_rows(places.rows, NAMES), read_tuned(places.tuned)
    if strange := found.strange_bases():
        raise UserError(
            f"zero-shot scores of {', '.join(strange)} are of another base or other sets than the rest; run these studies again"
        )
    if wrong := strangers(found, tuned):
        raise UserError(
            f"parameters are not those of {places.tuned}; run these studies again:\n" + "\n".join(wrong[:20])
        )
    return judge(claims_of(found, tuned)), found, tuned


def write(places: Places, judged: Sequence[Judged], found: Findings, tuned: Tuned) -> None:
    """The page with its figures and verdicts in a folder beside it."""
    plan = read_plan()
    commits = ", ".join(f"`{one}`" for one in sorted(set(found.rows["commit"])))
    about = About(
        plan["setting"], plan["covers"], f"{platform.machine()}, {os.cpu_count()} cores", commits, plan["remarks"] or {}, DATA
    )  # fmt: skip
    text = page(judged, found, tuned, about)  # before files change, because a remark may raise
    places.data.mkdir(parents=True, exist_ok=True)
    for name, picture in draw_all(found).items():
        (places.data / f"{name}.svg").write_text(picture, encoding="utf-8")
    answer = {one.claim.number: plain(one) for one in judged}
    (places.data / "claims.json").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    places.page.write_text(text, encoding="utf-8")


def told(judged: Sequence[Judged]) -> list[str]:
    """A line per claim."""
    return [
        f"{one.claim.number} {one.verdict}: {one.claim.claim} ({one.settled_by.key} {effect(one.settled_by)})"
        for one in judged
    ]


def compared(quick: Sequence[Judged], found: Findings, committed: Path) -> list[str]:
    """Comparison of one replicate with the committed numbers: how many of its scores, and of the deciding effects, are equal."""
    try:
        before = read_rows(committed / ROWS, NAMES)
        kept = json.loads((committed / "claims.json").read_text(encoding="utf-8"))
    except (UserError, FileNotFoundError):
        return ["no committed numbers to compare with"]
    keys = [*CELL, "replicate"]
    both = found.rows.merge(before.rows, on=keys, suffixes=("", "_before"))
    pairs = [(row[metric], row[f"{metric}_before"]) for row in both.to_dict("records") for metric in METRICS]
    apart = [abs(one - other) for one, other in pairs if not _close(one, other)]
    said = f"{len(pairs) - len(apart)} of {len(pairs)} final scores of {len(both)} trajectories ({len(found.rows)} here) are the committed ones to six digits"
    answer = [f"{said}; the others differ by at most {max(apart):.4f}" if apart else said]
    for one in quick:
        parts = {part["key"]: part for part in kept[one.claim.number]["parts"]}
        for part in one.claim.deciding:
            ((replicate, value),) = part.values.items()
            then = parts[part.key]["values"].get(str(replicate))
            if then is None:
                text = "nothing committed"
            else:
                text = "as committed" if _close(value, then, 5e-6) else f"committed: {then:+.4f}"
            answer.append(
                f"{one.claim.number}.{part.key} {value:+.4f} ({text} of {replicate}; the claim of all replicates: {kept[one.claim.number]['verdict']})"
            )
    return answer


def _close(one: float, other: float, within: float = 2e-6) -> bool:
    return bool(abs(one - other) < within or (pd.isna(one) and pd.isna(other)))


def reproduce(options: argparse.Namespace) -> list[str]:
    """Carry out the options; returns the lines to print. Raises UserError."""
    out = options.out or Path("runs/time_claims_quick" if options.quick else "runs/time_claims")
    places = Places(out, options.page or (out / "reproduction.md" if options.quick else PAGE))
    names = tuple(options.only or (STUDY_NAMES if options.quick else NAMES))
    if options.show:
        settings = {name: overrides(name, places.tuned) for name in names}
        return [json.dumps(study_words(file_of(name), out / name, settings[name])) for name in names]
    if not options.judge:
        run_studies(names, places, options.quick)
    if options.only:
        return [f"rows: {places.rows / name}.csv" for name in names]
    judged, found, tuned = judge_rows(places)
    write(places, judged, found, tuned)
    lines = compared(judged, found, PAGE.parent / DATA) if options.quick else told(judged)
    return [*lines, f"page: {places.page}"]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.claims", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        metavar="STUDY",
        help=f"run these and keep their rows, write no page: {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--judge", action="store_true", help="page and verdicts from the rows that are kept; runs nothing"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one replicate of each study, with the parameters of tuned.yaml"
    )
    parser.add_argument(
        "--show",
        action="store_true",
        help="print the words of each study's command line, as JSON, and run nothing",
    )
    parser.add_argument(
        "--out", type=Path, help="where studies run (default: runs/time_claims, runs/time_claims_quick)"
    )
    parser.add_argument(
        "--page", type=Path, help=f"what to write (default: {PAGE}; quick: OUT/reproduction.md)"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: reproduce(options))


if __name__ == "__main__":
    sys.exit(run_as_program(main))
