"""Techniques that use data against the golden vectors, through the public functions."""

from pathlib import Path

import pytest

from merge_service.merge import fold, merge
from merge_service.merging import Rules
from tests.merge_service.statistics import golden

CLOSED = ("fisher", "regmean", "lot", "mats", "wudi", "tsv_m", "knots_ties", "svc_task_arithmetic", "tatr")
LOOSE = Rules(any_base=True)


@pytest.mark.parametrize("case", golden.cases("merge", *CLOSED), ids=lambda case: case["name"])
def test_merge_gives_the_golden_vector(case: dict, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    statistics = golden.files(case, "statistics") or None
    merge(
        case["technique"], case["params"], golden.FOLDER / case["base"], golden.files(case, "experts"), out,
        rules=LOOSE, statistics=statistics, ids=[None] * len(case["experts"]),
    )  # fmt: skip
    golden.check(case, out)


@pytest.mark.parametrize(
    "case", golden.cases("fold", "fisher", "regmean", "dop"), ids=lambda case: case["name"]
)
def test_fold_gives_the_golden_vector(case: dict, tmp_path: Path) -> None:
    first, *others = golden.files(case, "experts")
    measured = golden.files(case, "statistics") or [None] * len(case["experts"])
    running, of_running = first, measured[0]
    for number, (expert, statistics) in enumerate(zip(others, measured[1:])):
        out = tmp_path / f"running-{number}.safetensors"
        given = [of_running, statistics] if statistics else None
        fold(case["technique"], case["params"], golden.FOLDER / case["base"], running, expert, out,
             rules=LOOSE, statistics=given)  # fmt: skip
        running, of_running = out, None
    golden.check(case, running)
