"""A pool of many samples in many shards, read as it is stored: plan, index, first batch, and an expert that is killed and resumed.

    python benchmarks/pool.py                                    # 1,000,000 samples in 1,000 shards: some minutes, 30 MB of pictures
    python benchmarks/pool.py --samples 20000 --shards 20        # a look

A few shards of small JPEG pictures are written below --work and repeated by hard links; the index reads, checks and notes every one of
them as if they were different. README.md in this directory says what the numbers are.

Invariant: every part runs in a process of its own, whose memory is watched from outside.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import process
import record
import yaml
from PIL import Image

BASE = record.ROOT / "configs" / "models" / "tiny-clip"
CLASSES = 10
SIDE = 32
TIMEOUT = 4 * 3600.0


def main() -> None:
    """Make the pool, run every part, print, save."""
    args = parse()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    process.clear(args.work)
    found: dict[str, Any] = {}
    for part in ("write_manifest", "first_plan", "plan", "index", "open", "batch"):
        found[part] = _in_a_process(args, part)
        print(part, json.dumps(found[part]), file=sys.stderr, flush=True)
    whole = _in_a_process(args, "train", "--expert", "whole")
    killed = _in_a_process(args, "train", "--expert", "killed", "--kill", str(args.steps // 2))
    resumed = _in_a_process(args, "train", "--expert", "killed")
    found["resume"] = {
        "same": whole["sha256"] == resumed["sha256"],
        "ended": killed["failure"],
        "whole": whole,
        "resumed": resumed,
    }
    settings = {n: getattr(args, n) for n in ("samples", "shards", "distinct", "batch_size", "steps")}
    print(json.dumps(settings | found, indent=1))
    record.save(args.json, settings, found)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument(
        "--distinct", type=int, default=10, help="shards that are written; the others are links"
    )
    parser.add_argument("--batch-size", type=int, default=512, help="of the first batch")
    parser.add_argument("--steps", type=int, default=6, help="of the expert")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench" / "pool"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--expert", default="", help=argparse.SUPPRESS)
    parser.add_argument("--kill", type=int, default=0, help=argparse.SUPPRESS)
    record.add_json(parser)
    return parser.parse_args()


def _in_a_process(args: argparse.Namespace, part: str, *more: str) -> dict[str, Any]:
    """What a part answers, with its peak of memory that no file backs."""
    names = ("samples", "shards", "distinct", "batch_size", "steps", "work")
    asked = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    run = process.measure([sys.executable, __file__, *asked, "--part", part, *more], 1, TIMEOUT)
    if run.failure and "--kill" not in more:
        raise SystemExit(f"{part}: {run.failure}")
    return {**run.answer, "peak": run.peak, "failure": run.failure}


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds and CPU seconds of a call."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def write_manifest(args: argparse.Namespace) -> dict[str, Any]:
    """Write shards, links, the manifest and a study; timed are the digests and the manifest."""
    from workers.data import manifest
    from workers.data.cache import file_sha256
    from workers.data.writer import Sample, write_dataset

    home, each = args.work / "data" / "pool", args.samples // args.shards
    (home / "train").mkdir(parents=True)
    (home / "classnames.txt").write_text("".join(f"thing {n}\n" for n in range(CLASSES)))
    (home / "zeroshot_classification_templates.txt").write_text("a {c}\na photo of a {c}\n")
    for number in range(args.shards):
        path = home / "train" / f"{number}.tar"
        if number < args.distinct:
            _write_shard(path, number, each)
        else:
            os.link(home / "train" / f"{number % args.distinct}.tar", path)
    colour = np.random.default_rng(1)
    few = [Sample(colour.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8), n % 2) for n in range(64)]
    for name in ("task", "kept"):
        write_dataset(
            args.work / "data" / name, kind="classification", classes=["one", "two"], templates=["a {c}"],
            splits={"train": few, "test": few},
        )  # fmt: skip
    tree = {
        "name": "pool",
        "model": {"config": str(BASE), "pretrained": str(BASE)},
        "data": {
            "root": str(args.work / "data"), "cache": str(args.work / "cache"), "reading": "encoded",
            "pretraining": ["pool"], "adaptation": ["task"], "held_out": ["kept"],
        },
        "stream": {"tasks": ["task"]},
        "recipe": {"batch_size": 64, "precision": "fp32", "mixture": {"pretraining": 0.5, "update": 0.5, "buffer": 0.0}},
        "budget": {"steps_per_task": args.steps},
        "grid": {"strategies": ["continual_finetuning_replay"]},
    }  # fmt: skip
    (args.work / "study.yaml").write_text(yaml.safe_dump(tree))

    def state() -> None:
        paths = [home / "train" / f"{number}.tar" for number in range(args.shards)]
        manifest.write_manifest(
            home,
            {
                "train": [
                    manifest.ShardInfo(path.name, file_sha256(path), each, path.stat().st_size)
                    for path in paths
                ]
            },
        )

    return timed(state)


def _write_shard(path: Path, seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(count):
            coarse = Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8))
            stream = io.BytesIO()
            coarse.resize((48, 40), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=80)
            for suffix, data in (("jpg", stream.getvalue()), ("cls", str(number % CLASSES).encode())):
                member = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """A plan of the study, which reads no shard of the pool."""
    from pipeline.workspace.workspace import Workspace

    return timed(lambda: Workspace.open(args.work / "study.yaml", [], args.work / "out"))


def index(args: argparse.Namespace) -> dict[str, Any]:
    """The index, made or opened."""
    from workers.data.encoded.index import Split, index_of
    from workers.data.manifest import describe

    root, cache = str(args.work / "data"), args.work / "cache"
    info = describe(root, "pool", cache)
    split = Split.of(root, info, "train")
    answer = timed(lambda: index_of(split, cache))
    size = sum(path.stat().st_size for path in split.place(cache).iterdir())
    return {**answer, "bytes": size}


def _job(args: argparse.Namespace) -> Any:
    from workers.jobs import EngineSpec, Source, TrainJob
    from workers.training.recipe import Mixture, Recipe

    root = str(args.work / "data")
    recipe = Recipe(batch_size=64, precision="fp32", mixture=Mixture(pretraining=0.5, update=0.5))
    out = args.work / f"expert-{args.expert}"
    (out / "weights").mkdir(parents=True, exist_ok=True)
    return TrainJob(
        fingerprint=f"pool {args.expert}", label="pool", t=1, task="task", init=str(BASE), base=str(BASE),
        update=(Source(root, "task", "train"),), buffer=(), pretraining=(Source(root, "pool", "train", reading="encoded"),),
        recipe=recipe.model_dump(), steps=args.steps, seed=1, engine=EngineSpec(), scratch=str(out / "scratch"),
        checkpoint_every=2, out=str(out / "weights"), cache=str(args.work / "cache"),
    )  # fmt: skip


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """A first batch from nothing: the index opened, samples chosen, pictures read, cut and resized."""
    import torch

    from workers.data.batches import Batches
    from workers.training.recipe import Recipe

    job = _job(args)
    job = replace(
        job, update=job.pretraining, pretraining=(), recipe=Recipe(batch_size=args.batch_size).model_dump()
    )

    def first() -> None:
        batches = Batches(
            job, lambda texts: torch.tensor([[len(text)] * 77 for text in texts]), {"size": SIDE}
        )
        share = batches.share(0)
        batches.read(share, 0, len(share.rows), np.empty(batches.shape, np.uint8))

    return timed(first)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """An expert that replays the pool; with --kill its process ends itself behind that step."""
    from workers.training.expert import train_expert

    def kill(step: int) -> None:
        if step == args.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    job = _job(args)
    answer = timed(lambda: train_expert(job, hooks={"train.after_step": kill} if args.kill else None))
    weights = next(Path(job.out).glob("*.safetensors")).read_bytes()
    shutil.rmtree(Path(job.scratch), ignore_errors=True)
    return {**answer, "sha256": hashlib.sha256(weights).hexdigest()}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "write_manifest": write_manifest, "first_plan": plan, "plan": plan, "index": index, "open": index, "batch": batch, "train": train,
}  # fmt: skip

if __name__ == "__main__":
    main()
