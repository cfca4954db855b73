"""Results of the tools, compared element by element, for the techniques whose definitions can be made to agree.

    python benchmarks/compare.py --size vit-b-16 --experts 4 --mergekit PYTHON --fusionbench PYTHON

What may differ: the rounding of sums; in TIES, which of several equal magnitudes at the threshold are kept (FusionBench
keeps one element more than asked for, and mergekit any of the equal ones), and the sign of a sum that cancels.

Invariant: results are compared as files, as a user of each tool gets them.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
from cases import CASES
from inputs import SIZES, Inputs, make_inputs
from process import clear, measure

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Pair:
    """A case, the peer to compare with, and our parameters that make it the peer's definition."""

    case: str
    peer: str
    params: dict[str, Any]


PAIRS = (
    Pair("average", "mergekit", {}),
    Pair("average", "fusionbench", {}),
    Pair("task_arithmetic", "mergekit", {}),
    Pair("task_arithmetic", "fusionbench", {}),
    Pair("ties", "mergekit", {"granularity": "tensor"}),
    Pair("ties", "fusionbench", {"granularity": "model"}),
    Pair("magmax", "fusionbench", {}),
)


def compare(inputs: Inputs, peers: dict[str, str], threads: int, out: Path) -> dict[str, Any]:
    """By "technique, peer": how many elements differ and by how much, or why it could not be found out."""
    base, experts = str(inputs.base), [str(path) for path in inputs.experts]
    found = {}
    for pair in PAIRS:
        if pair.peer not in peers:
            continue
        case, places = CASES[pair.case], [clear(out) / side for side in ("ours", "peer")]
        files = {"base": base if case.base else None, "experts": experts, "threads": threads}
        job = case.job(inputs) | files
        failure = None
        for place, python, script, more in (
            (places[0], sys.executable, "ours.py", {"params": {**case.params, **pair.params}}),
            (places[1], peers[pair.peer], f"peers_{pair.peer}.py", {}),
        ):
            place.mkdir()
            whole = {**job, **more, "out": str(place / "model.safetensors")}
            failure = failure or measure([python, HERE / script, json.dumps(whole)], threads, 1800).failure
        one, two = (place / "model.safetensors" for place in places)
        answer = {"failure": failure} if failure else difference(inputs.base, one, two)
        found[f"{pair.case}, {pair.peer}"] = answer
        print(f"{pair.case}, {pair.peer}: {json.dumps(answer)}", flush=True)
    clear(out)
    return found


def difference(base: Path, one: Path, two: Path) -> dict[str, Any]:
    """How two checkpoints of equal names and shapes differ.

    `fraction` of elements with other bits, the `largest` absolute difference, and the L2 norm of all differences
    `relative` to that of the merged task vector (0 where both are the base).
    """
    zero, left, right = (tensors(path) for path in (base, one, two))
    if set(left) != set(right):
        raise ValueError(
            f"{one} and {two} do not hold the same tensors: {sorted(set(left) ^ set(right))[:3]}"
        )
    elements = differing = 0
    largest = squares = norm = 0.0
    for name, values in left.items():
        gap = np.subtract(values, right[name], dtype=np.float64)
        elements += gap.size
        differing += int(np.count_nonzero(gap))
        largest = max(largest, float(np.abs(gap).max(initial=0)))
        squares += float(np.vdot(gap, gap))
        tau = np.subtract(values, zero[name], dtype=np.float64)
        norm += float(np.vdot(tau, tau))
    return {
        "elements": elements,
        "differing": differing,
        "fraction": differing / elements,
        "largest": largest,
        "relative": math.sqrt(squares / norm) if norm else 0.0,
    }


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The fp32 tensors of a safetensors file, flat and mapped."""
    data = np.memmap(path, np.uint8, "r")
    head = 8 + int.from_bytes(data[:8].tobytes(), "little")
    table = json.loads(data[8:head].tobytes())
    table.pop("__metadata__", None)
    return {
        name: data[head + entry["data_offsets"][0] : head + entry["data_offsets"][1]].view("<f4")
        for name, entry in table.items()
    }


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--fusionbench", metavar="PYTHON")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench")
    args = parser.parse_args()
    inputs = make_inputs(args.work, args.size, args.experts, args.threads)
    peers = {name: getattr(args, name) for name in ("mergekit", "fusionbench") if getattr(args, name)}
    print(report.differences(compare(inputs, peers, args.threads, args.work / "out")))


if __name__ == "__main__":
    main()
