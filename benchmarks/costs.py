"""The cost of the studies of configs/fomo_in_flux, counted on fake tensors and from their plans. Nothing is trained.

    python benchmarks/costs.py --json results/fomo-costs.json

Invariant: no figure depends on the load of the machine, and none needs the studies' data or weights.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import record
import yaml

from pipeline.workspace.workspace import Workspace
from workers.training.budget import measure, memory_ratio

STUDIES = Path(__file__).parents[1] / "configs" / "fomo_in_flux"
TOWERS = ("image", "text")


def models() -> dict[str, dict[str, Any]]:
    """One step of training each model of models.yaml, as that study trains it."""
    study = yaml.safe_load((STUDIES / "models.yaml").read_text())
    batch, precision = study["recipe"]["batch_size"], study["recipe"]["precision"]
    found = {}
    for model in study["grid"]["model"]:
        cost = measure(model["config"], batch, precision=precision)
        found[model["config"]] = {
            "gflops_per_step": cost.gflops_per_step,
            "parameters": cost.parameters,
            "weights_bytes": cost.weights_bytes,
            "peak_bytes": cost.peak_bytes,
        }
        print(model["config"], found[model["config"]], flush=True)
    return found


def plans(home: Path) -> dict[str, dict[str, int]]:
    """Trajectories, chains of training, and bytes on disk of each study, without its data."""
    found = {}
    for path in sorted(STUDIES.glob("*.yaml")):
        if "\ngrid:" not in path.read_text():
            continue
        nowhere = [f"data.root={home / 'nowhere'}", f"data.cache={home / 'cache'}"]
        plan = Workspace.open(path, nowhere, home / "out", provisional=True).plan
        found[path.name] = {
            "trajectories": len(plan.trajectories),
            "trained": plan.summary()["steps"]["train"]["unique"],
            "disk_bytes": plan.summary()["disk_bytes"],
        }
        print(path.name, found[path.name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    record.add_json(parser)
    asked = parser.parse_args()
    study = yaml.safe_load((STUDIES / "models.yaml").read_text())
    settings = {
        "batch_size": study["recipe"]["batch_size"],
        "total_gflops": float(study["budget"]["total_gflops"]),
    }
    ratios = {
        f"{tower}_tower_trained": memory_ratio(study["model"]["config"], settings["batch_size"], tower, study["recipe"]["precision"])
        for tower in TOWERS
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as home:
        found = {"models": models(), "memory_ratio": ratios, "plans": plans(Path(home))}
    record.save(asked.json, settings, found)


if __name__ == "__main__":
    main()
