"""The stream of checkpoints of `ours_evaluate.py`, scored by clip_benchmark. Run by an interpreter that has it.

    PYTHON benchmarks/peers_clip_benchmark.py '{"models": [...], "classification": [...], "retrieval": [...], ...}'

Calls what its command `clip_benchmark eval` calls, in fp32 (`--no_amp`), without loader processes (one thread is
measured), retrieval with `--task zeroshot_retrieval`. Prints one JSON line like `ours_evaluate.py`, with its metrics.
"""

import contextlib
import io
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("clip_benchmark", "torch", "open_clip_torch", "webdataset", "numpy")


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Score every checkpoint on every dataset, and read back what was written."""
    began = time.perf_counter()
    import torch
    from clip_benchmark.cli import get_parser_args, main_eval

    torch.set_num_threads(job["threads"])
    imported = time.perf_counter()

    def score(job: dict[str, Any], model: str, out: str) -> None:
        for task in ("classification", "retrieval"):
            if job[task]:
                sys.argv = ["clip_benchmark", *arguments(job, model, task, str(Path(job["out"], out)))]
                main_eval(get_parser_args()[1])

    with contextlib.redirect_stdout(io.StringIO()):
        first = {"classification": job["classification"][:1], "retrieval": []}
        score(job | first, job["models"][0], "first")  # before any clock starts, as ours
        warm = time.perf_counter(), time.process_time()
        for number, model in enumerate(job["models"]):
            score(job, model, str(number))
    spent = {
        "wall": time.perf_counter() - warm[0],
        "cpu": time.process_time() - warm[1],
        "import": imported - began,
    }
    scores = {
        model: {
            name: json.loads(Path(job["out"], f"{number}-{name}.json").read_text())["metrics"]
            for name in (*job["classification"], *job["retrieval"])
        }
        for number, model in enumerate(job["models"])
    }
    return {"scores": scores, **spent}


def arguments(job: dict[str, Any], model: str, task: str, out: str) -> list[str]:
    """The arguments of the command `clip_benchmark`."""
    return [
        "eval", "--dataset", *(f"wds/{name}" for name in job[task]), "--task", f"zeroshot_{task}",
        "--dataset_root", f"{job['root']}/{{dataset_cleaned}}", "--model", f"local-dir:{model}", "--pretrained", "",
        "--batch_size", str(job["batch_size"]), "--no_amp", "--num_workers", "0", "--output", f"{out}-{{dataset}}.json",
    ]  # fmt: skip


if __name__ == "__main__":
    wanted = sys.argv[1]
    print(
        json.dumps({p: version(p) for p in PACKAGES} if wanted == "--versions" else main(json.loads(wanted)))
    )
