"""A whole reproduction with invented scores, in which every claim holds by a wide margin."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from pipeline.claims import claims
from pipeline.claims.results import COLUMNS, Findings

REPLICATES = ("order 0", "order 1", "order 2")
INITS, DEPLOYS = ("base", "latest", "ema", "all"), ("latest", "all", "ema")
TECHNIQUES = ("average", "ties", "magmax")
WEIGHT = '{"weight": 0.4}'

Row = dict[str, Any]


def gm_of(row: Row) -> float:
    """Strategies far apart, techniques close together, more of everything is better."""
    strategy = {
        "base/all": 0.30,
        "base/base": 0.20,
        "latest/latest": 0.50,
        "ema/ema": 0.56,
        "joint/joint": 0.60,
    }
    value = strategy.get(f"{row['init']}/{row['deploy']}", 0.40)
    value += 0.002 * (TECHNIQUES.index(row["technique"]) if row["technique"] in TECHNIQUES else 0)
    value += 0.02 * row["replay"] + 0.01 * ("schedule" in row["params"])
    if row["init"] == "ema":
        value += 0.01 * ({"s": 0, "m": 1, "l": 2}[row["model"]]) + 0.02 * (row["multiplier"] - 2)
    return value - 0.001 * row["tasks"] + 0.001 * REPLICATES.index(row["replicate"])


def findings(score: Callable[[Row], float] = gm_of) -> Findings:
    rows = []
    for row in _rows():
        gm = score(row)
        name = "-".join(str(row[key]) for key in ("study", "init", "deploy", "technique", "params", "model", "multiplier", "tasks", "replicate", "replay"))  # fmt: skip
        for t, share in ((0, 0.5), (row["tasks"], 1.0)):
            rows.append({**row, "trajectory": name, "t": t, "last": t > 0, "ka": gm * share, "zs": gm * share, "gm": gm * share, "plan": "p"})  # fmt: skip
    return Findings(pd.DataFrame(rows, columns=list(COLUMNS)))


def _rows() -> Iterator[Row]:
    common = {"replay": True, "model": "s", "multiplier": 1.0, "tasks": 10}
    for replicate in REPLICATES:
        for study, what in _strategies():
            yield {**common, "params": "{}", "study": study, **what, "replicate": replicate}


def _strategies() -> Iterator[tuple[str, Row]]:
    zero = {"init": "base", "deploy": "base", "technique": "-"}
    baseline = {"init": "latest", "deploy": "latest", "technique": "-"}
    offline = {"init": "base", "deploy": "all", "technique": "average"}
    ema = {"init": "ema", "deploy": "ema", "technique": "average"}
    cells = [
        c for c in itertools.product(INITS, DEPLOYS) if c not in (("base", "latest"), ("latest", "latest"))
    ]
    for study, techniques in (
        (claims.CELLS, TECHNIQUES),
        (claims.NO_REPLAY, ("average",)),
        (claims.DATASETS, ("average",)),
    ):
        replay = {"replay": study != claims.NO_REPLAY}
        yield study, {**baseline, **replay}
        yield study, {**zero, **replay}
        for (init, deploy), technique in itertools.product(cells, techniques):
            yield study, {"init": init, "deploy": deploy, "technique": technique, **replay}
    yield claims.OFFLINE, baseline
    for technique in TECHNIQUES:
        yield claims.OFFLINE, {**offline, "technique": technique, "replay": False}
    for replay, params in ((True, "{}"), (True, '{"schedule": "linear"}'), (False, '{"schedule": "linear"}')):
        yield claims.OFFLINE, {**offline, "replay": replay, "params": params}
    for strategy in (zero, baseline, offline, ema, {"init": "joint", "deploy": "joint", "technique": "-"}):
        for multiplier in (0.5, 1.0, 4.0):
            yield claims.BUDGETS, {**strategy, "multiplier": multiplier}
    for strategy, model in itertools.product((baseline, offline, ema), ("s", "m", "l")):
        yield claims.SIZES, {**strategy, "model": model}
    for weight in (0.1, 0.5, 0.9):
        yield claims.WEIGHTS, {**ema, "params": f'{{"weight": {weight}}}'}
    for (init, deploy), tasks in itertools.product(cells, (6, 20)):
        yield claims.HORIZONS, {"init": init, "deploy": deploy, "technique": "average", "tasks": tasks}
    for tasks in (6, 20):
        yield claims.HORIZONS, {**baseline, "tasks": tasks}
