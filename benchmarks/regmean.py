"""RegMean beside FusionBench's: the same image towers, the same Gram matrices from files, alternating processes, results compared.

    python benchmarks/regmean.py --size vit-b-16 --experts 8 --fusionbench PYTHON

FusionBench's own class runs (`RegMeanAlgorithm.run`); its Gram matrices come from the files instead of a trainer's passes over data, because
those need its own models and data sets. Both fit the matrices of blocks with elements off the diagonal times .95 and average the rest.
FusionBench merges the image tower alone, so the checkpoints are image towers. Weights and Gram matrices are random (a diagonal and some
directions, of full rank): no cost depends on them.

Invariant: every run is a process of its own; contenders take turns within a round, on inputs that were read before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
from compare import difference
from inputs import SIZES, Architecture, Inputs, Shapes, make_inputs
from process import MIB, clear, measure

HERE = Path(__file__).parent
OFF_DIAGONAL = 0.95
DIRECTIONS = 64


@dataclass(frozen=True)
class Measured:
    """Checkpoints, and the file of Gram matrices of each expert."""

    inputs: Inputs
    grams: list[Path]

    def job(self, experts: int) -> dict[str, Any]:
        """What a contender reads, with parameters of ours."""
        return {
            "base": str(self.inputs.base), "experts": [str(one) for one in self.inputs.experts[:experts]],
            "options": {"statistics": [str(one) for one in self.grams[:experts]]},
        }  # fmt: skip


def prepared(work: Path, size: str, experts: int, threads: int) -> Measured:
    """Image towers and their Gram matrices under `work`; what is there already is kept."""
    inputs = make_inputs(work, f"{size}-image", experts, threads)
    grams = [path.with_suffix(".gram.safetensors") for path in inputs.experts]
    shapes = SIZES[f"{size}-image"].shapes()
    for number, path in enumerate(grams):
        if not path.exists():
            write_grams(path, shapes, number)
    return Measured(inputs, grams)


def write_grams(path: Path, shapes: Shapes, seed: int) -> None:
    """A file of Gram matrices of the matrices in blocks."""
    sys.path.insert(0, str(record.ROOT))
    from merge_service.statistics import About, write

    write(path, dict(_grams(shapes, np.random.default_rng(seed))), About("gram", {}, 1))


def _grams(shapes: Shapes, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    for name, shape in shapes.items():
        if ".resblocks." in name and len(shape) == 2:
            some = rng.standard_normal((shape[1], DIRECTIONS), np.float32)
            yield (
                name,
                some @ some.T / DIRECTIONS + np.diag(rng.random(shape[1], np.float32) + np.float32(0.1)),
            )


def rounds(args: argparse.Namespace, measured: Measured, tiny: Measured) -> dict[str, Any]:
    """Every run, the ratios of each round, and how the last results differ."""
    job = {
        "case": "regmean", "technique": "regmean", "form": "merge", "params": {"off_diagonal": OFF_DIAGONAL},
        "threads": args.threads, "first": tiny.job(2), **measured.job(args.experts),
    }  # fmt: skip
    contenders = {
        "ours": [sys.executable, HERE / "ours.py"],
        "fusionbench": [args.fusionbench, HERE / "peers_fusionbench.py"],
    }
    found: dict[str, Any] = {"runs": {name: [] for name in contenders}}
    places = {name: clear(args.work / "out" / name) / "model.safetensors" for name in contenders}
    for number in range(args.rounds):
        for name, command in contenders.items():
            measured.inputs.warm([*measured.inputs.experts, *measured.grams])
            run = measure(
                [*command, json.dumps({**job, "out": str(places[name])})], args.threads, args.timeout
            )
            if run.failure:
                sys.exit(f"{name}: {run.failure}")
            answer = run.answer
            print(
                f"round {number + 1} {name}: {answer['seconds']:.1f} s, {answer['merge_cpu']:.1f} CPU s, {run.peak / MIB:.0f} MiB",
                flush=True,
            )
            found["runs"][name].append(run.as_json())
    ours, theirs = found["runs"].values()
    for key, of in (
        ("wall", lambda run: run["answer"]["seconds"]),
        ("cpu", lambda run: run["answer"]["merge_cpu"]),
        ("peak", lambda run: run["peak"]),
    ):
        found.setdefault("ratios", {})[key] = [of(a) / of(b) for a, b in zip(ours, theirs)]
    found["difference"] = difference(measured.inputs.base, *places.values())
    clear(args.work / "out")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [name for name, one in SIZES.items() if type(one) is Architecture]
    parser.add_argument("--size", choices=sizes, default="tiny")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--fusionbench", metavar="PYTHON", required=True, help="an interpreter that has fusion-bench"
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench")
    parser.add_argument("--timeout", type=float, default=3600)
    record.add_json(parser)
    args = parser.parse_args()
    measured, tiny = (
        prepared(args.work, *what, args.threads) for what in ((args.size, args.experts), ("tiny", 2))
    )
    found = rounds(args, measured, tiny)
    print({key: round(median(values), 3) for key, values in found["ratios"].items()}, found["difference"])
    words = [args.fusionbench, HERE / "peers_fusionbench.py", "--versions"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    settings = {key: getattr(args, key) for key in ("size", "experts", "rounds", "threads")}
    bytes_of = {"checkpoint_bytes": measured.inputs.nbytes, "gram_bytes": measured.grams[0].stat().st_size}
    record.save(args.json, {**settings, **bytes_of}, found, fusionbench=json.loads(said))


if __name__ == "__main__":
    main()
