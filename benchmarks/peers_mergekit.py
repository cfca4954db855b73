"""One merge by mergekit in its own process. Run by an interpreter that has mergekit.

    PYTHON benchmarks/peers_mergekit.py '{"case": "ties", "base": ..., "experts": [...], "out": ..., "threads": 2}'

Does what its command `mergekit-pytorch` does with a configuration file, for plain safetensors files: the same classes,
in the same order, with the default options except for the number of threads. Prints one JSON line like `ours.py`.
The two tiny checkpoints of job["first"] are merged first, as ours are, so that libraries loaded at first use are loaded.
"""

import json
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("mergekit", "torch", "transformers", "numpy", "safetensors")
DENSITY = {"density": 0.2}
# case -> merge_method, parameters of the merge, parameters of each expert
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "average": ("linear", {"normalize": True}, {"weight": 1.0}),
    "ema_fold": ("linear", {"normalize": True}, {"weight": 1.0}),
    "slerp_fold": ("slerp", {"t": 0.5}, {}),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.3, "normalize": False}, {"weight": 1.0}),
    "ties": ("ties", {"normalize": True}, {"weight": 1.0, **DENSITY}),
    "dare_ties": ("dare_ties", {"normalize": True}, {"weight": 1.0, **DENSITY}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"normalize": True}, {"weight": 1.0, "gamma": 0.01, **DENSITY}),
}


def main(job: dict[str, Any]) -> dict[str, float]:
    """Merge as the job says: first the two tiny checkpoints in job["first"], then what is measured."""
    began = time.perf_counter()
    import mergekit.scripts.merge_raw_pytorch  # noqa: F401

    imported = time.perf_counter()
    merge(job | job["first"])
    loaded, cpu = time.perf_counter(), time.process_time()
    merge(job)
    spent = {"seconds": time.perf_counter() - loaded, "merge_cpu": time.process_time() - cpu}
    return {**spent, "import": imported - began, "load": loaded - imported}


def merge(job: dict[str, Any]) -> None:
    """Its output is a directory with a model.safetensors in the place of job["out"]."""
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    options = MergeOptions(num_threads=job["threads"])
    _apply_once(options)
    config = RawPyTorchMergeConfig.model_validate(configuration(job))
    tasks = plan_flat_merge(config, str(Path(job["out"]).parent), False, False, options)
    Executor(tasks, math_device=options.device, storage_device="cpu").execute()


@cache
def _apply_once(options: Any) -> None:
    """Its command does this once a process; torch refuses a second time."""
    options.apply_global_options()


def configuration(job: dict[str, Any]) -> dict[str, Any]:
    """The content of the YAML file of `mergekit-pytorch`."""
    method, parameters, each = METHODS[job["case"]]
    base = job["experts"][0] if method == "slerp" else job["base"]
    models = [{"model": path, "parameters": each} for path in job["experts"]]
    config = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    return config if base is None else {**config, "base_model": base}


if __name__ == "__main__":
    wanted = sys.argv[1]
    print(
        json.dumps({p: version(p) for p in PACKAGES} if wanted == "--versions" else main(json.loads(wanted)))
    )
