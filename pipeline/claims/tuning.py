"""Parameters and rivals, chosen before anything is judged, on the validation split of an order that no claim is judged on.

Each cell (init, deploy, technique, with or without replay) gets the grid point with the best final GM; of equal ones the first in
the study wins. The rivals (the best offline technique, the best strategy that is not Best-in-TIME, with replay and without) are
the best there with the chosen parameters. The choices are written to a file (`Tuned`), from which the other studies take their
parameters.

Invariant: a cell or technique that is not tuned is never judged, and no judged number affects a choice.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from merge_service.errors import UserError
from pipeline.claims.results import Findings

TUNING = ("tuning", "tuning_no_replay")
CELL = ["replay", "init", "deploy", "technique"]
HEAD = "# Written by `python -m pipeline.claims --only tuning tuning_no_replay` from their rows in docs/reproduction/rows. Do not edit.\n"


@dataclass(frozen=True)
class Tuned:
    """Parameters by cell (`CELL`), and the rivals with replay (True) and without: a technique, and a strategy (init, deploy)."""

    params: Mapping[tuple[bool, str, str, str], Mapping[str, Any]]
    technique: Mapping[bool, str]
    strategy: Mapping[bool, tuple[str, str]]

    def offline(self, replay: bool) -> dict[str, str]:
        """The best offline technique, as a `where` of `Findings`."""
        return {"init": "base", "deploy": "all", "technique": self.technique[replay]}

    def rival(self, replay: bool) -> dict[str, Any]:
        """The best strategy other than Best-in-TIME, as a `where` of `Findings`."""
        init, deploy = self.strategy[replay]
        return {"init": init, "deploy": deploy, "technique": ["average", "-"]}


def swept(found: Findings) -> pd.DataFrame:
    """Every point of the grids: `CELL`, params, ka, zs, gm, whether it is the `chosen` one of its cell, and whether it is at an
    `edge`.

    An edge is the least or the largest value of a grid of several.
    """
    rows = pd.concat([found.final(study) for study in TUNING]).drop_duplicates([*CELL, "params"])
    rows = rows[rows["technique"] != "-"].reset_index(drop=True)
    best = rows.groupby(CELL, sort=False)["gm"].idxmax()
    value = rows["params"].map(
        lambda text: next((v for v in json.loads(text).values() if not isinstance(v, str)), None)
    )
    rows = rows.assign(chosen=rows.index.isin(best), value=value.astype(float))
    grid = rows.groupby(CELL, sort=False)["value"]
    ends = (rows["value"] == grid.transform("min")) | (rows["value"] == grid.transform("max"))
    rows["edge"] = ends & (grid.transform("nunique") > 1)
    return rows[[*CELL, "params", "ka", "zs", "gm", "chosen", "edge"]]


def tune(found: Findings) -> Tuned:
    """The parameters and rivals that the grids choose."""
    rows = swept(found)
    rows = rows[rows["chosen"]]
    offline = rows[(rows["init"] == "base") & (rows["deploy"] == "all")]
    strategies = pd.concat([found.final(study) for study in TUNING])
    strategies = strategies[(strategies["technique"] == "-") & (strategies["deploy"] != "base")]
    strategies = pd.concat([rows[rows["technique"] == "average"], strategies])
    strategies = strategies[(strategies["init"] != "ema") | (strategies["deploy"] != "ema")]
    return Tuned(
        {tuple(row[key] for key in CELL): json.loads(row["params"]) for row in rows.to_dict("records")},
        {
            bool(replay): str(group.loc[group["gm"].idxmax(), "technique"])
            for replay, group in offline.groupby("replay")
        },
        {bool(replay): _best_strategy(group) for replay, group in strategies.groupby("replay")},
    )


def _best_strategy(rows: pd.DataFrame) -> tuple[str, str]:
    row = rows.reset_index(drop=True).sort_values("gm", ascending=False, kind="stable").iloc[0]
    return str(row["init"]), str(row["deploy"])


def write_tuned(path: Path, tuned: Tuned) -> None:
    """Write as YAML, a line per cell."""
    lines = [HEAD + "parameters:"]
    lines += [
        f"  - {_flow({**dict(zip(CELL, cell, strict=True)), 'params': dict(params)})}"
        for cell, params in tuned.params.items()
    ]
    lines += ["rivals:"]
    for replay in sorted(tuned.technique, reverse=True):
        init, deploy = tuned.strategy[replay]
        lines.append(
            f"  - {_flow({'replay': replay, 'technique': tuned.technique[replay], 'init': init, 'deploy': deploy})}"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _flow(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, width=1_000).strip()


def read_tuned(path: Path) -> Tuned:
    """Read the file that `write_tuned` wrote. Raises UserError if there is no such file."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; run python -m pipeline.claims --only {' '.join(TUNING)} first"
        ) from None
    return Tuned(
        {tuple(one[key] for key in CELL): one["params"] for one in raw["parameters"]},
        {one["replay"]: one["technique"] for one in raw["rivals"]},
        {one["replay"]: (one["init"], one["deploy"]) for one in raw["rivals"]},
    )


def with_parameters(study: Mapping[str, Any], tuned: Tuned) -> list[dict[str, Any] | str]:
    """`grid.strategies` of a raw study with the tuned parameters in every entry that has a technique and no parameters of its
    own.

    Entries with lists stand for every combination, as in any study. Raises UserError for a cell that was not tuned.
    """
    return [
        strategy
        for entry in study["grid"]["strategies"]
        for strategy in (_combinations(entry, study, tuned) if _open(entry) else [entry])
    ]


def _open(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "technique" in entry and "params" not in entry


def _combinations(
    entry: Mapping[str, Any], study: Mapping[str, Any], tuned: Tuned
) -> Iterator[dict[str, Any]]:
    mixture = entry.get("mixture", study["recipe"].get("mixture", {}))
    axes = [
        entry[key] if isinstance(entry[key], list) else [entry[key]]
        for key in ("init", "deploy", "technique")
    ]
    for init, deploy, technique in itertools.product(*axes):
        cell = (mixture.get("buffer", 0) > 0, init, deploy, technique)
        if cell not in tuned.params:
            raise UserError(
                f"study {study['name']}: {init} -> {deploy} by {technique} was not tuned {'with' if cell[0] else 'without'} replay"
            )
        yield {
            **entry,
            "init": init,
            "deploy": deploy,
            "technique": technique,
            "params": dict(tuned.params[cell]),
        }


def strangers(found: Findings, tuned: Tuned) -> list[str]:
    """Trajectories outside the tuning whose parameters are not the chosen ones, each with the expected parameters."""
    told = []
    for row in found.rows[~found.rows["study"].isin(TUNING)].to_dict("records"):
        wanted, given = tuned.params.get(tuple(row[key] for key in CELL)), json.loads(row["params"])
        if wanted is not None and given != wanted and "schedule" not in given:
            told.append(
                f"{row['study']}: {row['trajectory']} has {row['params']}, the grid says {json.dumps(wanted)}"
            )
    return told
