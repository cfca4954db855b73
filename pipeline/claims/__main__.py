"""`python -m pipeline.claims`: run the studies of a reproduction, judge the claims, write page, figures and tables.

Invariant: studies run through the command line as anybody would run them, so each goes on where it stopped; the page is written
only when all of them are finished, and a quick reproduction never replaces the committed page.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from merge_service.errors import UserError
from pipeline.claims import claims
from pipeline.claims.figures import draw_all
from pipeline.claims.judge import Judged
from pipeline.claims.page import page
from pipeline.claims.results import CELL, Findings, read_findings
from pipeline.claims.tuning import TUNING, strangers, swept

STUDIES = Path("configs/studies/time_claims")
PAGE = Path("docs/reproduction.md")
DATA = "reproduction"


def reproduce(out: Path, target: Path, quick: bool, rerun: bool) -> list[str]:
    """Run (if `rerun`) and judge; returns what to tell a person, a line per claim. Raises UserError."""
    plan = yaml.safe_load((STUDIES / "reproduce.yaml").read_text(encoding="utf-8"))
    names = tuple(name for name in (*TUNING, *claims.STUDIES) if not quick or name not in TUNING)
    for name in names if rerun else ():
        run(name, out / name, plan["quick"][name] if quick else [])
    found = read_findings(out, names)
    wrong = (
        [] if quick else strangers(found, tuple(name for name in claims.STUDIES if name != claims.WEIGHTS))
    )
    if wrong:
        raise UserError("parameters are not those that the rule chooses:\n" + "\n".join(wrong))
    judged = claims.judge_all(found)
    write(target, judged, found, plan, quick)
    if not quick:
        return told(judged)
    return [
        *told(judged, PAGE.parent / DATA / "claims.json"),
        agreement(found, PAGE.parent / DATA / "final.csv"),
    ]


def run(name: str, out: Path, overrides: Sequence[str]) -> None:
    """One study by the command line, its progress passed on. Raises UserError when it does not finish."""
    began = time.monotonic()
    words = [word for setting in overrides for word in ("--set", setting)]
    print(f"study {name}: {out}", file=sys.stderr, flush=True)
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "pipeline.cli",
            "run",
            str(STUDIES / f"{name}.yaml"),
            "--out",
            str(out),
            *words,
        ],
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if answer.returncode:
        raise UserError(
            f"study {name} ended with exit code {answer.returncode}; give the same command again to go on"
        )
    print(f"study {name}: done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def write(
    target: Path, judged: Sequence[Judged], found: Findings, plan: Mapping[str, Any], quick: bool
) -> None:
    """The page at `target` with its figures and numbers in a folder beside it."""
    folder, made_by = target.parent / DATA, commit()  # asked before files change
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in draw_all(found).items():
        (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    points = found.points.drop(columns=["last", "plan"]).round(6)
    points[found.points["last"]].to_csv(folder / "final.csv", index=False)
    if TUNING[0] in set(found.points["study"]):
        swept(found).round(6).to_csv(folder / "tuning.csv", index=False)
    curves = points[
        (points["study"] == claims.CELLS) & points["technique"].isin(claims.AVERAGED["technique"])
    ]
    curves.to_csv(folder / "over_time.csv", index=False)
    plans = dict(found.points.groupby("study", sort=False)["plan"].first())
    alone = {one.number: one.verdict for one in claims.judge_all(found.of_one_replicate())}
    answer = {
        "commit": made_by,
        "quick": quick,
        "plans": plans,
        "claims": {one.number: {**one.plain(), "of_one_replicate": alone[one.number]} for one in judged},
    }
    (folder / "claims.json").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    about = {
        "commit": made_by, "machine": f"{platform.machine()}, {os.cpu_count()} cores", "setting": plan["setting"],
        "steps": f"{found.points['trajectory'].groupby(found.points['study']).nunique().sum()} trajectories",
    }  # fmt: skip
    target.write_text(page(judged, found, about, plan["remarks"] or {}, DATA), encoding="utf-8")


def told(judged: Sequence[Judged], committed: Path | None = None) -> list[str]:
    """A line per claim; beside committed verdicts, whether it is theirs, and what the same replicate says there if it is not."""
    before = (
        json.loads(committed.read_text(encoding="utf-8"))["claims"]
        if committed and committed.exists()
        else {}
    )
    return [
        f"{one.number} {one.verdict}{_beside(one, before.get(one.number))}: {one.claim}" for one in judged
    ]


def _beside(one: Judged, before: Mapping[str, Any] | None) -> str:
    if before is None:
        return ""
    if before["verdict"] == one.verdict:
        return " (as committed)"
    alone = before["of_one_replicate"]
    same = (
        "as committed of this replicate" if alone == one.verdict else f"committed of this replicate: {alone}"
    )
    return f" ({same}; of all: {before['verdict']})"


def agreement(found: Findings, committed: Path) -> str:
    """How many of the final scores are those of the committed numbers, to six digits."""
    if not committed.exists():
        return "no committed numbers to compare with"
    keys = [*CELL, "replicate"]
    before = pd.read_csv(committed, dtype={"params": str})
    now = found.points[found.points["last"]].round(6)
    both = now.merge(before, on=keys, suffixes=("", "_before"))
    same = (both["gm"] - both["gm_before"]).abs() < 2e-6
    return f"{int(same.sum())} of {len(both)} final scores are the committed ones to six digits"


def commit() -> str:
    """The commit of the code that ran, marked where files were changed since."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.claims", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one replicate of each study, without tuning")
    parser.add_argument("--no-run", action="store_true", help="judge what is there")
    parser.add_argument(
        "--out", type=Path, help="where studies run (default: runs/time_claims, runs/time_claims_quick)"
    )
    parser.add_argument(
        "--page", type=Path, help=f"what to write (default: {PAGE}; quick: OUT/reproduction.md)"
    )
    options = parser.parse_args(arguments)
    out = options.out or Path("runs/time_claims_quick" if options.quick else "runs/time_claims")
    target = options.page or (out / "reproduction.md" if options.quick else PAGE)
    try:
        lines = reproduce(out, target, options.quick, not options.no_run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*lines, f"page: {target}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
