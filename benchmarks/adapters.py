"""Experts that are adapters beside whole models in one study: bytes of an arrival, speed of training, final scores.

    python benchmarks/adapters.py --root data/mini

Invariant: both kinds of experts are trained by the same run, on the same workers, tasks, seeds and budget.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import record
from storage import run

from pipeline.store.artifact import is_whole
from pipeline.study.config import load_study

STUDY = Path("configs/lora.yaml")
KINDS = {"adapters": "{rank: 8, alpha: 16}", "whole models": "null"}


def arrivals(out: Path) -> dict[str, dict[str, float]]:
    """Of each kind of expert: their number, the bytes that are kept of one, and the median of their samples per second."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for path in sorted((out / "store" / "train").glob("*/record.json")):
        one = json.loads(path.read_text())
        whole = one.get("held") != "adapter"
        sizes = [
            file["bytes"]
            for name, file in one["files"].items()
            if name.endswith(".safetensors") and is_whole(name) == whole
        ]
        kind = "whole models" if whole else "adapters"
        found[kind].append({"bytes": sum(sizes), "speed": one["result"]["samples_per_second"]})
    return {
        kind: {
            "experts": len(ones),
            "bytes": mean(one["bytes"] for one in ones),
            "samples_per_second": median(one["speed"] for one in ones),
        }
        for kind, ones in found.items()
    }


def scores(out: Path) -> list[dict[str, Any]]:
    """The final KA, ZS and GM of every trajectory, with its kind of experts."""
    cells = {cell.id: cell for cell in load_study(out / "study.yaml").cells}
    found = []
    for one in json.loads((out / "results.json").read_text())["trajectories"]:
        strategy, last = cells[one["id"]].strategy, one["steps"][-1]
        found.append(
            {
                "kind": "adapters" if cells[one["id"]].recipe.adapter else "whole models",
                "strategy": f"{strategy.init} → {strategy.deploy}",
                **{key: last[key] for key in ("ka", "zs", "gm")},
            }
        )
    return found


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("data/mini"), help="the mini suite's folder")
    parser.add_argument("--steps", type=int, default=40, help="of every expert")
    record.add_json(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="temporal-merge-adapters-") as work:
        out = Path(work) / "run"
        grid = f"grid.recipe.adapter=[{', '.join(KINDS.values())}]"
        run(STUDY, out, [f"data.root={args.root}", f"budget.steps_per_task={args.steps}", grid])
        found = {"arrivals": arrivals(out), "scores": scores(out)}
    print(json.dumps(found, indent=1))
    record.save(args.json, {"study": STUDY.name, "steps": args.steps, "adapter": KINDS["adapters"]}, found)


if __name__ == "__main__":
    main()
