"""The cost of a tracking server that is down: one study with MLflow's store in OUT, with no server at the tracker's address,
and with a server that accepts every connection and never answers.

    python benchmarks/tracker_down.py STUDY.yaml [--rounds 3] [--set key=value ...]

Runs alternate, each in a fresh OUT, so that nothing is reused. Prints wall and CPU seconds of the training steps, and wall
seconds from the start of the first step to the end of the last, as ratios to the run with MLflow's store in each round.

Invariant: the silent server reads nothing and writes nothing, so a client waits until its own limit.
"""

import argparse
import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import record

from pipeline.run.trace import read_timeline

ROOT = Path(__file__).parent.parent
NOBODY = "http://127.0.0.1:9"
UP = "up"
Figures = dict[str, float]


@contextlib.contextmanager
def silent() -> Iterator[tuple[str, list[socket.socket]]]:
    """A server on loopback that keeps every connection open and says nothing: its address, and the connections so far."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            with contextlib.suppress(OSError):  # the server was closed
                while True:
                    taken.append(server.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        finally:
            for connection in taken:
                connection.close()


def measure(study: Path, overrides: list[str], uri: str | None) -> Figures:
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
        return {
            "training, wall": sum(row["end"] - row["start"] for row in trained),
            "training, CPU": sum(row["cpu_seconds"] for row in trained),
            "all steps, wall": max(row["end"] for row in rows) - min(row["start"] for row in rows),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    record.add_json(parser)
    asked = parser.parse_args()
    runs: dict[str, list[Figures]] = {UP: [], "nobody": [], "silent": []}
    reached = []
    for number in range(asked.rounds):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            with silent() as (address, connections):
                uri = {UP: None, "nobody": NOBODY, "silent": address}[name]
                runs[name].append(measure(asked.study, asked.overrides, uri))
                if name == "silent":
                    reached.append(len(connections))
            print(name, runs[name][-1], flush=True)
    ratios = {
        name: {what: [down[what] / up[what] for down, up in zip(runs[name], runs[UP])] for what in runs[UP][0]}
        for name in runs if name != UP
    }  # fmt: skip
    for name, of in ratios.items():
        for what, values in of.items():
            print(f"{name}, {what}: median {median(values):.3f}, {min(values):.3f} to {max(values):.3f}")
    settings = {"study": asked.study.name, "set": asked.overrides, "rounds": asked.rounds}
    record.save(asked.json, settings, {"runs": runs, "ratios": ratios, "silent_connections": reached})


if __name__ == "__main__":
    main()
