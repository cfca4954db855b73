"""Speed of scoring merged checkpoints, beside clip_benchmark and beside the bare forward passes.

    python benchmarks/evaluate.py --clip-benchmark PYTHON

Trains a few short experts and merges growing sets of them by two techniques. Three contenders score this stream of checkpoints on
the test splits of the mini suite: ours with nothing decoded yet, ours with decoded datasets, clip_benchmark. With `--model
vit-b-16` the checkpoints are towers of that size with random weights. Prints a table, and whether the scores are equal.
README.md in this directory explains the columns.

Invariant: contenders alternate within a round, each in its own process, and a ratio is taken within a round. Each scores the
first checkpoint on the first dataset before its clock starts, and finds the shards in the page cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import record
from jobs import MODELS, TASKS, excerpt, expert, model, suite, towers
from process import clear, measure

from workers.data.decode import load
from workers.jobs import Source
from workers.models.model import preprocess_cfg

HERE = Path(__file__).parent
COLD, WARM, TENTH = "ours, nothing decoded", "ours", "ours, fraction 0.1"
PEER = "clip_benchmark"
Rounds = dict[str, list[dict[str, Any]]]


def stream(args: argparse.Namespace, pool: list[str]) -> list[str]:
    """Weights directories of merges of 1, 2, ... experts, by averaging and by TIES; made once per number of checkpoints."""
    from merge_service.merge import merge
    from workers.training.expert import train_expert

    if args.model == "vit-b-16":
        return [str(path) for path in towers(args.work, args.checkpoints)]
    place, base = args.work / f"stream-{args.model}-{args.checkpoints}", model(args.model, args.work)
    made = [place / "merged" / f"{number}-{name}" for number in range(1, -(-args.checkpoints // 2) + 1) for name in ("average", "ties")]  # fmt: skip
    if not (place / "complete").is_file():
        experts = []
        for task in TASKS[: -(-args.checkpoints // 2)]:
            job = {
                "root": str(args.root), "cache": str(args.work / "decoded"), "pool": pool, "model": str(base),
                "batch_size": 64, "precision": "fp32", "threads": args.threads, "out": str(clear(place / task)),
            }  # fmt: skip
            (place / task / "weights").mkdir()
            train_expert(expert(job, 30, task=task))
            experts.append(place / task / "weights")
        for out in made:
            number, technique = int(out.name.split("-")[0]), out.name.split("-")[1]
            out.parent.mkdir(exist_ok=True)
            params = {"density": 0.2, "scale": 1.0} if technique == "ties" else {}
            merge(technique, params, base, experts[:number], clear(out), threads=args.threads)
        (place / "complete").touch()
    return [str(path) for path in made[: args.checkpoints]]


def run(args: argparse.Namespace) -> Rounds:
    """Every answer of every contender."""
    roles = suite(args.root)
    names = args.datasets or list(dict.fromkeys((*roles["held_out"], *roles["adaptation"])))
    root = excerpt(args.root, names, args.images, clear(args.work / "excerpt")) if args.images else args.root
    job = {
        "models": stream(args, roles["pretraining"]), "root": str(root), "threads": args.threads,
        "batch_size": args.batch_size, "cache": str(args.work / "decoded"), "decoded": str(args.work / "decoded"), "limits": 1 if args.images else 3, "out": str(args.work / "scored"), "fraction": 1.0,
        "classification": [name for name in names if name != "emoji_names"],
        "retrieval": [name for name in names if name == "emoji_names"],
    }  # fmt: skip
    contenders: dict[str, tuple[list[Any], dict[str, Any]]] = {
        COLD: (
            [sys.executable, HERE / "ours_evaluate.py"],
            {"cache": str(args.work / "scored"), "limits": 0},
        ),
        WARM: ([sys.executable, HERE / "ours_evaluate.py"], {}),
        TENTH: ([sys.executable, HERE / "ours_evaluate.py"], {"fraction": 0.1}),
    }
    if args.images:
        contenders.pop(TENTH)
    decode(job)
    if args.clip_benchmark:
        contenders[PEER] = ([args.clip_benchmark, HERE / "peers_clip_benchmark.py"], {})
    rounds: Rounds = {name: [] for name in contenders}
    for number in range(args.rounds):
        for name, (command, more) in contenders.items():
            clear(args.work / "scored")
            for shard in root.glob("*/test/*.tar"):
                shard.read_bytes()
            done = measure([*command, json.dumps(job | more)], args.threads, args.timeout)
            if done.failure:
                sys.exit(f"{name}: {done.failure}")
            answer = done.answer | {"peak": done.peak}
            print(
                f"{number + 1}/{args.rounds} {name}: {answer['wall']:.2f} s, CPU {answer['cpu']:.2f} s",
                flush=True,
            )
            rounds[name].append(answer)
    return rounds


def decode(job: dict[str, Any]) -> None:
    """Fill the cache that all but the first contender find."""
    preprocess = preprocess_cfg(Path(job["models"][0]))
    for name in (*job["classification"], *job["retrieval"]):
        load(Source(job["root"], name, "test"), preprocess["size"], job["decoded"], preprocess)


def table(rounds: Rounds) -> str:
    """Markdown: medians of the stream's seconds, of one evaluation's, and of the ratios to clip_benchmark in each round."""
    lines = [
        "| | whole stream, s: wall, CPU | times clip_benchmark: wall, CPU | first, later evaluations, CPU ms | the two towers alone, CPU ms |",
        "|---|---|---|---|---|",
    ]
    for name, answers in rounds.items():
        whole = [median(a[clock] for a in answers) for clock in ("wall", "cpu")]
        against, each, least = "", "", ""
        if PEER in rounds and name != TENTH:
            ratios = [
                median(b[c] / a[c] for a, b in zip(answers, rounds[PEER], strict=True))
                for c in ("wall", "cpu")
            ]
            against = f"{ratios[0]:.1f}, {ratios[1]:.1f}"
        if name != PEER:
            first, later = (median(a[k] * 1e3 for a in answers) for k in ("cpu_first", "cpu_later"))
            each = f"{first:.0f}, {later:.0f}"
            least = f"{median(a['limit'] * 1e3 for a in answers):.0f}" if name != COLD else ""
        lines.append(f"| {name} | {whole[0]:.1f}, {whole[1]:.1f} | {against} | {each} | {least} |")
    return "\n".join(lines)


def equal(rounds: Rounds) -> dict[str, Any]:
    """How many scores are those of clip_benchmark: accuracies to the digit, recalls made of as many hits.

    It states recalls as fp32 means, one for each direction, so a mean of both is equal when it is so up to fp32's rounding:
    one hit more or less is at least a thousand times that.
    """
    differing, compared = [], 0
    ours = rounds[WARM][0]["scores"]
    for directory, metrics in rounds[PEER][0]["scores"].items():
        for name, theirs in metrics.items():
            score = ours[directory][name]
            compared += 1
            if "acc1" in theirs:
                same = score == theirs["acc1"]
            else:
                recalls = theirs["image_retrieval_recall@5"], theirs["text_retrieval_recall@5"]
                same = abs(score - sum(recalls) / 2) < 1e-7
            if not same:
                differing.append(f"{Path(directory).name} on {name}: {score}, clip_benchmark {theirs}")
    repeated = all(answer["scores"] == ours for name in (COLD, WARM) for answer in rounds[name])
    return {"compared": compared, "differing": differing, "ours_same_in_every_process": repeated}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    work = Path(tempfile.gettempdir()) / "temporal-merge-bench"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip-benchmark", metavar="PYTHON", help="an interpreter that has clip_benchmark")
    parser.add_argument("--model", choices=(*MODELS, "vit-b-16"), default="tiny")
    parser.add_argument(
        "--datasets", type=lambda text: text.split(","), metavar="a,b,...", help="default: all"
    )
    parser.add_argument("--images", type=int, help="so many of each test split; default: all")
    parser.add_argument("--checkpoints", type=int, default=8, help="at most 12, default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="of every contender")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds, for each run")
    parser.add_argument(
        "--root", type=Path, default=work / "mini", help="of the mini suite; written if missing"
    )
    parser.add_argument("--work", type=Path, default=work)
    record.add_json(parser)
    args = parser.parse_args(arguments)
    if args.model != "vit-b-16" and not 2 <= args.checkpoints <= 2 * len(TASKS):
        parser.error(f"--checkpoints must be 2 to {2 * len(TASKS)}")
    args.root, args.work = args.root.resolve(), args.work.resolve()
    return args


def main() -> None:
    """Measure, print, save."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    rounds = run(args)
    peers: dict[str, Any] = {}
    found: dict[str, Any] = {
        "runs": {name: [_timed(answer) for answer in answers] for name, answers in rounds.items()}
    }
    if args.clip_benchmark:
        versions = [args.clip_benchmark, HERE / "peers_clip_benchmark.py", "--versions"]
        peers[PEER] = json.loads(subprocess.run(versions, capture_output=True, text=True, check=True).stdout)
        found["equal"] = equal(rounds)
    images = rounds[WARM][0]["images"]
    print(
        f"\n{args.model}, {args.checkpoints} checkpoints, {images} images in all datasets, {args.threads} thread(s), "
        f"medians of {args.rounds}\n\n{table(rounds)}\n"
    )
    print(json.dumps(found.get("equal", {}), indent=1))
    settings = {
        name: getattr(args, name) for name in ("model", "checkpoints", "batch_size", "threads", "rounds")
    }
    record.save(args.json, settings | {"images": images}, found, **peers)


def _timed(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key != "scores"}


if __name__ == "__main__":
    main()
