"""Chaos: runs of the tiny study with random faults, each of which must give the result of an undisturbed run.

    python -m tests.faults.soak --runs 20 --seed 7

Every run gets three random faults out of those that the matrix places one by one: workers, merge actors and drivers
killed,
stopped or endless at named points, disks that fill up, a tracker that is down at the first start of the driver. A
driver that
ends is started again with the same command. Each run prints a line; the exit code is 0 if all results were the same and
nothing leaked.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from pipeline.tracking.outbox import glance
from tests.faults.harness import DRIVER_POINTS, WORKER_POINTS, Faults, must_be_same, workers_of
from tests.servers import free_port, mlflow_at
from tests.world import Cluster, World, command, make_world, start

FAULTS = 3
TRACKER = "tracker gone from the first start on, back for the second"
STARTS = FAULTS + 2
"""A driver is started once, once more for every fault, and one spare time that no run should need."""
RESOURCES = {
    "experts": {"checkpoint_every": 2, "timeout": 25},
    "merging": {"timeout": 25},
    "evaluation": {"timeout": 25},
}


def draw(rng: random.Random, out: Path, faults: Faults) -> list[str]:
    """Place three random faults and return their descriptions."""
    told = []
    kinds = rng.choices(("worker", "worker", "driver", "stuck", "disk", "beside", "tracker"), k=FAULTS)
    of_driver = [point for point in DRIVER_POINTS if "tracker" not in kinds or point != "tracking.after_send"]
    for kind in kinds:
        nth = rng.randint(1, 2)
        if kind == "tracker" and TRACKER not in told:
            told.append(TRACKER)
            continue
        if kind in ("driver", "tracker"):
            point, more = rng.choice(of_driver), {}
        elif kind == "stuck":
            point, more = (
                rng.choice(("train.after_step", "merge.start", "evaluate.start")),
                {"do": rng.choice(("stop", "spin"))},
            )
        elif kind == "disk":
            point, more = rng.choice(("store.after_stage", "store.before_record")), {"do": "full"}
        else:
            point = rng.choice(WORKER_POINTS)
            more = {"pid_file": str(out / "driver.json")} if kind == "beside" else {}
        faults.at(point, nth=nth, **more)
        told.append(f"{more.get('do', 'kill driver' if 'pid_file' in more else 'kill')} at {point} #{nth}")
    return told


def one(world: World, cluster: Cluster, undisturbed: Path, room: Path, seed: int) -> dict[str, object]:
    """Run once to the end, through all faults. Raises AssertionError if the result differs or anything is left."""
    rng, faults, out = random.Random(seed), Faults(room), room / "out"
    placed, began, codes = draw(rng, out, faults), time.monotonic(), list[int]()
    with contextlib.ExitStack() as served:
        port = free_port() if TRACKER in placed else None
        uri = f"http://127.0.0.1:{port}" if port else None
        study = world.study(resources=RESOURCES, **({"tracking": {"uri": uri}} if uri else {}))
        while not codes or codes[-1] != 0:
            assert len(codes) < STARTS, f"started {len(codes)} times: {codes}"
            if uri and len(codes) == 1:
                served.enter_context(mlflow_at(port, room))
            process = start("run", study, "--out", out, "--address", cluster.address, faults=faults.placed)
            said = process.communicate(timeout=300)[1]
            codes.append(process.returncode)
            assert "Traceback" not in said, said
        if uri and len(codes) == 1:  # one start was enough, so all rows still wait
            assert glance(out).pending > 0, "the tracker was not missed"
            served.enter_context(mlflow_at(port, room))
        assert command("sync", out).returncode == 0
        must_be_same(out, undisturbed, cluster, uri)
    assert not faults.missed, f"never fired: {faults.missed}"
    return {"seed": seed, "faults": placed, "fired": FAULTS, "exit_codes": codes, "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(10**6), help="reported if it is drawn"
    )
    settings = parser.parse_args()
    print(f"{settings.runs} runs, seed {settings.seed}", flush=True)
    same, fired = 0, 0
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        for name in ("world", "ray", "undisturbed"):
            (root / name).mkdir()
        world, cluster = make_world(root / "world"), Cluster(root / "ray")
        try:
            undisturbed = root / "undisturbed" / "out"
            answer = command("run", world.study(), "--out", undisturbed, "--address", cluster.address)
            assert answer.returncode == 0, answer.stderr
            for number in range(settings.runs):
                room = root / f"run{number}"
                room.mkdir()
                try:
                    seen = one(world, cluster, undisturbed, room, settings.seed + number)
                    same, fired = same + 1, fired + int(str(seen["fired"]))
                    print(f"[{number + 1}/{settings.runs}] same: {json.dumps(seen)}", flush=True)
                except AssertionError as error:
                    print(
                        f"[{number + 1}/{settings.runs}] NOT THE SAME, seed {settings.seed + number}: {error}",
                        flush=True,
                    )
            left = workers_of(cluster)
        finally:
            cluster.stop()
    print(f"{same} of {settings.runs} the same, {fired} faults fired, {len(left)} worker processes left")
    return 0 if same == settings.runs and not left else 1


if __name__ == "__main__":
    sys.exit(main())
