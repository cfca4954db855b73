"""The effects of the study again, from the kept files and by other code: plain dictionaries, no frames, numpy's own line fits."""

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.claims.judge import HOLDS
from pipeline.claims.when_ema import advising, measures
from pipeline.claims.when_ema.design import Piece
from pipeline.claims.when_ema.hypotheses import judge_all
from pipeline.claims.when_ema.numbers import read_numbers, write
from pipeline.claims.when_ema.page import measures_of, verdicts_as_json, with_advice
from pipeline.results.ema_weight import MEASURED
from tests.pipeline.claims.when_ema.toys import NAMES, World, numbers
from tests.world import ROOT

COMMITTED = ROOT / "docs" / "when_ema"
Scores = dict[tuple[str, str, float, float], tuple[float, float]]
"""(init, deploy, weight, rate) -> V and S."""


def kept(folder: Path) -> Path:
    """An invented study as it is kept in files."""
    truth = numbers(World(replicates=4))
    for row in truth.made.to_dict("records"):
        piece = Piece(row["piece"], row["replicate"], "s", (), core=True)
        mine = truth.of(piece.name).of_replicates([piece.replicate])
        frames = {name: getattr(mine, name).drop(columns=measures.UNIT) for name in ("points", "experts")}
        write(folder, piece, {**frames, "made": mine.made})
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def untrained(home: Path) -> float:
    """S of zero-shot."""
    found = [
        float(row["gm_test"]) for row in read(home / "points.csv") if int(row["t"]) > 0 and not row["lr"]
    ]
    return math.fsum(found) / len(found)


def scores(home: Path) -> Scores:
    sums: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for row in read(home / "points.csv"):
        if int(row["t"]) > 0 and row["lr"]:
            weight = float(row["weight"]) if row["weight"] else 1.0
            sums[row["init"], row["deploy"], weight, float(row["lr"])].append(
                (float(row["gm_val"]), float(row["gm_test"]))
            )
    return {
        key: (math.fsum(v for v, _ in rows) / len(rows), math.fsum(s for _, s in rows) / len(rows))
        for key, rows in sums.items()
    }


def pick(found: Scores, init: str, deploy: str, lr: float | None = None) -> tuple[float, float]:
    """S and the weight of what V chooses."""
    ranked = [
        (v, -rate, weight, s)
        for (i, d, weight, rate), (v, s) in found.items()
        if (i, d) == (init, deploy) and lr in (None, rate)
    ]
    _, _, weight, score = max(ranked)
    return score, weight


def drift(home: Path, lr: float) -> float:
    rows = [
        float(row["relative_drift"])
        for row in read(home / "experts.csv")
        if row["init"] == "latest" and float(row["lr"]) == lr
    ]
    return math.fsum(rows) / len(rows)


def again(homes: dict[float, Path]) -> dict[str, float]:
    """The effects of one replicate, whose core pieces these are by share."""
    found = {share: scores(home) for share, home in homes.items()}
    shares, rates = sorted(found), sorted({key[3] for key in next(iter(found.values()))})
    span = shares[-1] - shares[0]
    gain = {
        share: pick(one, "ema", "ema")[0] - pick(one, "latest", "latest")[0] for share, one in found.items()
    }
    logs = {share: [math.log10(drift(homes[share], lr)) for lr in rates] for share in shares}
    at = {
        share: [
            pick(found[share], "ema", "ema", lr)[0] - pick(found[share], "latest", "latest", lr)[0]
            for lr in rates
        ]
        for share in shares
    }
    best = {
        share: [
            max(
                (v, weight) for (i, d, weight, rate), (v, _) in found[share].items() if i == d and rate == lr
            )[1]
            for lr in rates
        ]
        for share in shares
    }
    return {
        **{f"gain_{share:g}": value for share, value in gain.items()},
        **{
            f"base_{share:g}": pick(one, "ema", "ema")[0] - untrained(homes[share])
            for share, one in found.items()
        },
        **{
            f"apart_{share:g}": pick(one, "latest", "ema")[0] - pick(one, "ema", "ema")[0]
            for share, one in found.items()
        },
        "fall": -np.polyfit(shares, [gain[share] for share in shares], 1)[0] * span,
        "rise": np.mean([np.polyfit(logs[share], at[share], 1)[0] for share in shares]),
        "weight_by_drift": -np.mean([np.polyfit(logs[share], best[share], 1)[0] for share in shares]),
        "weight_by_share": np.mean(
            [
                np.polyfit(shares, [best[share][place] for share in shares], 1)[0]
                for place in range(len(rates))
            ]
        )
        * span,
    }


def flat(tree: object, path: str = "") -> dict[str, object]:
    """The leaves of a tree of JSON by their path."""
    if isinstance(tree, dict):
        return {
            key: leaf for name, part in tree.items() for key, leaf in flat(part, f"{path}/{name}").items()
        }
    if isinstance(tree, list | tuple):
        return flat({str(index): part for index, part in enumerate(tree)}, path)
    return {path: tree}


@pytest.mark.parametrize("which", ["invented", "committed"])
def test_every_effect_is_found_again_by_other_code(which: str, tmp_path: Path) -> None:
    folder = kept(tmp_path) if which == "invented" else COMMITTED / "numbers"
    if which == "committed" and not (COMMITTED / "verdicts.json").is_file():
        pytest.skip("too few replicates are committed for a verdict yet")
    judged = judge_all(measures.core(read_numbers(folder), NAMES))
    parts = {
        answer.part.key: answer.part.values
        for one in judged.hypotheses
        for answer in (*one.deciding, *one.beside)
    }
    parts |= {answer.part.key: answer.part.values for answer in (*judged.gains, *judged.above_base)}
    for replicate in judged.replicates:
        homes = {
            float(read(folder / f"{replicate}-{name}" / "made.csv")[0]["share"]): folder
            / f"{replicate}-{name}"
            for name in NAMES
        }
        for key, value in again(homes).items():
            assert parts[key][replicate] == pytest.approx(value, abs=1e-9), (replicate, key)
    if which == "committed":
        stated = json.loads((COMMITTED / "verdicts.json").read_text())
        computed = flat(verdicts_as_json(judged))
        assert flat(stated) == pytest.approx(computed, abs=1e-9)  # last digits differ between processors


def test_page_on_choosing_gives_the_advice_of_the_study() -> None:
    choosing, page = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("choosing", "when_ema"))
    assert choosing == with_advice(choosing, page) != with_advice(choosing, "**Advice.** Anything else.\n")


def test_reports_advise_the_weight_that_the_committed_numbers_support() -> None:
    core = measures.core(read_numbers(COMMITTED / "numbers"), NAMES)
    found = advising.fitted(core)
    assert found is not None and flat(found.to_json()) == pytest.approx(flat(MEASURED.to_json()), rel=1e-5)
    assert flat(json.loads((COMMITTED / "advice.json").read_text())) == flat(MEASURED.to_json())
    assert measures_of(advising.tested(core))[0].verdict == HOLDS  # else no report may advise it
