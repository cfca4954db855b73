"""How much smaller `temporal-merge pack` makes the experts of a finished run; the run is as it was afterwards.

    python benchmarks/pack.py runs/demo

Invariant: every number is of experts that were trained; `pack --undo` checks that each comes back with its sha256.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import record

from pipeline.workspace.packing import pack


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="OUT of a finished run")
    record.add_json(parser)
    args = parser.parse_args()
    began = time.process_time()
    answer = pack(args.run)
    spent = time.process_time() - began
    pack(args.run, undo=True)
    experts = [
        {"before": one["before"], "after": one["after"]} for one in answer["experts"] if not one["why"]
    ]
    if not experts:
        raise SystemExit(f"{args.run} has no expert that can be packed")
    ratios = sorted(one["before"] / one["after"] for one in experts)
    print(f"{len(experts)} experts: {ratios[0]:.2f} to {ratios[-1]:.2f} times smaller, {spent:.1f} s of CPU")
    record.save(args.json, {"run": args.run.name}, {"experts": experts, "cpu": spent})


if __name__ == "__main__":
    main()
