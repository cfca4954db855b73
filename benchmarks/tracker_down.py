"""What a tracking server that never answers costs: the same study with MLflow's store in OUT, and with nobody at the address.

    python benchmarks/tracker_down.py STUDY.yaml [--pairs 3] [--set key=value ...]

Runs alternate, each in a fresh OUT, so that nothing is reused. Told are wall and CPU seconds of the training steps, and wall
seconds from the first step's beginning to the last one's end, as ratios of each pair (down / up); then their medians.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.run.trace import read_timeline

ROOT = Path(__file__).parent.parent
NOBODY = "http://127.0.0.1:9"
FIGURES = ("training, wall", "training, CPU", "all steps, wall")


def measure(study: Path, overrides: list[str], uri: str | None) -> tuple[float, ...]:
    """One run in a process of its own: its figures in seconds."""
    with tempfile.TemporaryDirectory() as room:
        out = Path(room) / "out"
        settings = [*overrides, *([f"tracking.uri={uri}"] if uri else [])]
        subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "run", str(study), "--out", str(out)]
            + [word for setting in settings for word in ("--set", setting)],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        rows = [row for row in read_timeline(out) if "fingerprint" in row]
        trained = [row for row in rows if row["kind"] == "train"]
        return (
            sum(row["end"] - row["start"] for row in trained),
            sum(row["cpu_seconds"] for row in trained),
            max(row["end"] for row in rows) - min(row["start"] for row in rows),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    asked = parser.parse_args()
    ratios: list[tuple[float, ...]] = []
    for pair in range(asked.pairs):
        order = (None, NOBODY) if pair % 2 == 0 else (NOBODY, None)
        seconds = {uri: measure(asked.study, asked.overrides, uri) for uri in order}
        ratios.append(tuple(down / up for down, up in zip(seconds[NOBODY], seconds[None], strict=True)))
        told = zip(FIGURES, seconds[None], seconds[NOBODY], ratios[-1], strict=True)
        print(
            "; ".join(f"{what} {up:.1f} s, down {down:.1f} s, {ratio:.3f}" for what, up, down, ratio in told)
        )
    for what, values in zip(FIGURES, zip(*ratios, strict=True), strict=True):
        print(f"{what}: median {statistics.median(values):.3f}, {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main()
