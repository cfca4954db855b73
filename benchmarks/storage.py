"""What `storage.keep` costs: one study under each choice, its seconds, its disk, and whether its results are the same.

    python benchmarks/storage.py configs/demo.yaml [--keep all,none] [--rounds 2] [--set key=value ...]
    python benchmarks/storage.py --small-disk 3        # as root: a study of ViT-B/16's size on a disk of base, experts and two merges

Runs alternate, each in a fresh OUT, so that nothing is reused. *Wall* is from the start of the first step to the end of the last, *CPU* that
of all steps, *disk* the bytes of the store by inode after the run. A small disk is a file system in memory of a fixed size.

Invariant: runs whose results.json or whose checkpoints' sha256 differ end the benchmark.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import record

from pipeline.run.trace import read_timeline

ROOT = Path(__file__).parent.parent
Figures = dict[str, float]
TASKS = ("skin_tone", "icon_style", "emoji_group")
"""Sets of few classes; with a locked text tower, their classifiers are made once and the time goes to checkpoints."""
VIT: dict[str, Any] = {
    "name": "small-disk",
    "data": {"held_out": ["digits8"], "pretraining": []},
    "recipe": {
        "lr": 1e-6,
        "batch_size": 2,
        "precision": "fp32",
        "trainable": "image",
        "mixture": {"update": 1},
    },
    "budget": {"steps_per_task": 1},
    "evaluation": {"fraction": 0.002},
    "grid": {
        "strategies": [
            {"init": "base", "deploy": "all", "technique": ["average", "task_arithmetic", "magmax"]},
        ],
    },
    "tracking": {"log_weights": False},
}


def run(study: Path, out: Path, overrides: list[str]) -> str:
    """One run in a process of its own. Returns its standard error; ends the benchmark where the run fails."""
    command = [sys.executable, "-m", "pipeline.cli", "run", str(study), "--out", str(out)]
    words = [word for one in overrides for word in ("--set", one)]
    answer = subprocess.run([*command, *words], cwd=ROOT, check=False, capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"{overrides}: exit {answer.returncode}: {answer.stderr[-3000:]}")
    return answer.stderr


def figures(out: Path) -> Figures:
    """Seconds and bytes of a finished run."""
    rows = [row for row in read_timeline(out) if "fingerprint" in row]
    return {
        "wall": max(row["end"] for row in rows) - min(row["start"] for row in rows),
        "cpu": sum(row["cpu_seconds"] for row in rows),
        "disk": disk(out / "store"),
        "train": disk(out / "store" / "train"),
        "base": disk(out / "store" / "base"),
        "merge": disk(out / "store" / "merge"),
    }


def disk(folder: Path) -> int:
    """Bytes of all files below a folder; a file with several names counts once."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            found[status.st_ino] = status.st_size
    return sum(found.values())


def identity(out: Path) -> dict[str, Any]:
    """What must be equal under every choice: the results, and the sha256 of every checkpoint."""
    records = {}
    for path in sorted((out / "store").glob("*/*/record.json")):
        one = json.loads(path.read_text())
        if one["kind"] in ("train", "merge"):
            records[one["fingerprint"]] = {
                name: file["sha256"] if isinstance(file, dict) else file
                for name, file in one["files"].items()
                if name.endswith(".safetensors")
            }
    return {"results": untimed(json.loads((out / "results.json").read_text())), "sha256": records}


def untimed(found: Any) -> Any:
    """The same without measured seconds."""
    if isinstance(found, list):
        return [untimed(one) for one in found]
    if not isinstance(found, dict):
        return found
    return {key: untimed(value) for key, value in found.items() if not key.endswith("seconds")}


def compared(asked: argparse.Namespace) -> dict[str, Any]:
    """Every choice in turns."""
    choices = asked.keep.split(",")
    runs: dict[str, list[Figures]] = {name: [] for name in choices}
    same = None
    for number in range(asked.rounds):
        for name in choices if number % 2 == 0 else reversed(choices):
            with tempfile.TemporaryDirectory(dir=asked.work) as room:
                out = Path(room) / "out"
                run(asked.study, out, [*asked.overrides, f"storage.keep={name}"])
                found = identity(out)
                runs[name].append(figures(out))
            print(name, runs[name][-1], flush=True)
            same = same or found
            if found != same:
                raise SystemExit(f"keep: {name} gave other results than {choices[0]}")
    first = runs[choices[0]]
    ratios = {
        name: {
            what: [one[what] / other[what] for one, other in zip(of, first)]
            for what in ("wall", "cpu", "disk")
        }
        for name, of in runs.items()
        if name != choices[0]
    }
    for name, of in ratios.items():
        print(f"{name} / {choices[0]}:", {what: round(median(values), 3) for what, values in of.items()})
    assert same is not None
    return {"runs": runs, "ratios": ratios, "checkpoints": len(same["sha256"])}


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A file system in memory that holds `size` bytes. Needs root."""
    with tempfile.TemporaryDirectory() as room:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", room], check=True)
        try:
            yield Path(room)
        finally:
            subprocess.run(["umount", "--lazy", room], check=True)


def bounded(experts: int, work: Path) -> dict[str, Any]:
    """A study of checkpoints of a ViT-B/16's size under `keep: none`, on a disk that holds the base, the experts and two merges.

    The model reads pictures of 32 px and short texts, so that the time goes to checkpoints.
    """
    import open_clip

    from pipeline.workspace.workspace import Workspace

    with tempfile.TemporaryDirectory(dir=work) as room:
        study = Path(room) / "study.json.yaml"
        tasks = list(TASKS[:experts])
        data = {**VIT["data"], "root": str(ROOT / "data" / "mini"), "adaptation": tasks}
        model = open_clip.get_model_config("ViT-B-16")
        assert model is not None
        model["vision_cfg"]["image_size"], model["text_cfg"]["context_length"] = 32, 16
        config = Path(room) / "model.json"
        config.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
        own = {"data": data, "stream": {"tasks": tasks}, "model": {"config": str(config), "pretrained": None}}
        study.write_text(json.dumps({**VIT, **own}))
        planned = Workspace.open(study, ["storage.keep=none"], Path(room) / "out", provisional=True)
        kinds = [step.kind for step in planned.plan.steps.values()]
        checkpoint = max(step.disk_bytes for step in planned.plan.steps.values())
        size = planned.summary()["disk_least_bytes"] + checkpoint + (64 << 20)  # and the base, and records
        answers = {}
        with small_disk(size) as disk_:
            out = disk_ / "out"
            refused = subprocess.run(
                [sys.executable, "-m", "pipeline.cli", "run", str(study), "--out", str(out)],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            answers["keep all"] = {"exit": refused.returncode, "said": refused.stderr[-600:]}
            run(study, out, ["storage.keep=none"])
            answers["keep none"] = {"exit": 0, **figures(out)}
            usage = os.statvfs(disk_)
            answers["free at the end"] = usage.f_bavail * usage.f_frsize
        return {
            "disk": size,
            "checkpoint": checkpoint,
            "steps": {k: kinds.count(k) for k in set(kinds)},
            **answers,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, nargs="?", default=Path("configs/demo.yaml"))
    parser.add_argument("--keep", default="all,none")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--small-disk", type=int, metavar="TASKS", help="a ViT-B/16 stream of so many tasks")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    record.add_json(parser)
    asked = parser.parse_args()
    found = bounded(asked.small_disk, asked.work) if asked.small_disk else compared(asked)
    print(json.dumps(found, indent=1))
    settings = {
        "study": asked.study.name,
        "set": asked.overrides,
        "keep": asked.keep,
        "small_disk": asked.small_disk,
    }
    record.save(asked.json, settings, found)


if __name__ == "__main__":
    main()
