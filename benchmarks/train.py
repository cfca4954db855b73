"""Speed of training an expert in our worker, beside a bare torch and open_clip loop over the same decoded data.

    python benchmarks/train.py --model tiny

Each round runs one process per contender, one after another: the bare loop, the bare loop with equal prompts shared, ours
with plain torch and with DeepSpeed. Prints a table of medians and of ratios to the bare loop. README.md in this directory
explains the columns.

Invariant: contenders alternate within a round, and a ratio is taken within a round, so that other load on the machine slows
both of its sides.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import record
from jobs import MODELS, model, suite
from process import clear, measure

HERE = Path(__file__).parent
BARE = "bare loop"
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    BARE: ("bare_train.py", {"share_texts": False}),
    "bare loop, prompts shared": ("bare_train.py", {"share_texts": True}),
    "ours, torch": ("ours_train.py", {"engine": "torch", "stage": 0}),
    "ours, DeepSpeed stage 0": ("ours_train.py", {"engine": "deepspeed", "stage": 0}),
    "ours, DeepSpeed stage 1": ("ours_train.py", {"engine": "deepspeed", "stage": 1}),
    "ours, DeepSpeed stage 2": ("ours_train.py", {"engine": "deepspeed", "stage": 2}),
}
Rounds = dict[str, list[dict[str, Any]]]


def run(args: argparse.Namespace) -> Rounds:
    """Every answer of every contender."""
    roles = suite(args.root)
    job = {
        "root": str(args.root), "cache": str(args.work / "decoded"), "pool": roles["pretraining"], "steps": args.steps,
        "model": str(model(args.model, args.work)), "batch_size": args.batch_size, "precision": args.precision,
        "threads": args.threads, "out": str(args.work / "trained"),
    }  # fmt: skip
    rounds: Rounds = {name: [] for name in args.contenders}
    for number in range(
        args.rounds + 1
    ):  # the first decodes, compiles and fills the page cache; it does not count
        for name in args.contenders:
            file, more = CONTENDERS[name]
            clear(args.work / "trained")
            done = measure([sys.executable, HERE / file, json.dumps(job | more)], args.threads, args.timeout)
            if done.failure:
                sys.exit(f"{name}: {done.failure}")
            answer = done.answer | {"peak": done.peak}
            said = f"{answer['wall_step'] * 1e3:.1f} ms a step, {answer['wall_whole']:.2f} s in all"
            print(f"{number}/{args.rounds} {name}: {said}, loss {answer['loss']:.3f}", flush=True)
            if number:
                rounds[name].append(answer)
    return rounds


def table(rounds: Rounds, batch_size: int) -> str:
    """Markdown: medians of rates and seconds, and medians of the ratios to the bare loop within each round."""
    lines = [
        "| | samples/s, steady: wall, CPU | to bare: wall, CPU | whole expert, s: wall, CPU | to bare: wall, CPU | around the steps, CPU ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, answers in rounds.items():
        rate = [median(batch_size / a[f"{clock}_step"] for a in answers) for clock in ("wall", "cpu")]
        whole = [median(a[f"{clock}_whole"] for a in answers) for clock in ("wall", "cpu")]
        ratios = [
            median(b[key] / a[key] for a, b in zip(answers, rounds[BARE], strict=True))
            for key in ("wall_step", "cpu_step", "wall_whole", "cpu_whole")
        ]
        around = median(a["cpu_whole"] - a["samples"] / batch_size * a["cpu_step"] for a in answers)
        lines.append(
            f"| {name} | {rate[0]:.0f}, {rate[1]:.0f} | {ratios[0]:.2f}, {ratios[1]:.2f} | {whole[0]:.2f}, {whole[1]:.2f} "
            f"| {ratios[2]:.2f}, {ratios[3]:.2f} | {around * 1e3:.0f} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    work = Path(tempfile.gettempdir()) / "temporal-merge-bench"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of every contender")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", default="0,1,2", help="of DeepSpeed, default: %(default)s")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds, for each run")
    parser.add_argument(
        "--root", type=Path, default=work / "mini", help="of the mini suite; written if missing"
    )
    parser.add_argument("--work", type=Path, default=work)
    record.add_json(parser)
    args = parser.parse_args(arguments)
    wanted = [f"ours, DeepSpeed stage {stage}" for stage in args.stages.split(",") if stage]
    args.contenders = [name for name in CONTENDERS if "DeepSpeed" not in name or name in wanted]
    args.root, args.work = args.root.resolve(), args.work.resolve()
    return args


def main() -> None:
    """Measure, print, save."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    rounds = run(args)
    print(
        f"\n{args.model}, {args.steps} steps of {args.batch_size}, {args.precision}, {args.threads} thread(s), "
        f"medians of {args.rounds}\n\n{table(rounds, args.batch_size)}\n"
    )
    settings = {
        n: getattr(args, n) for n in ("model", "steps", "batch_size", "precision", "threads", "rounds")
    }
    record.save(args.json, settings, {"runs": rounds})


if __name__ == "__main__":
    main()
