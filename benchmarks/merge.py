"""Speed of a merge, beside the least work that any merge must do and beside other tools.

    python benchmarks/merge.py --size vit-b-16 --experts 8 --mergekit PYTHON --fusionbench PYTHON

Makes inputs. Then, for every technique and repeat, runs one process per contender, one after another, with the inputs in the
page cache: the limit, ours, our command line, mergekit, FusionBench. Prints tables of medians. README.md in this directory
explains the columns.

Invariant: contenders alternate within a repeat, so that other load on the machine slows all of them alike.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import peers_fusionbench
import peers_mergekit
import record
import report
from cases import CASES, Case
from compare import compare
from inputs import SIZES, Inputs, make_inputs
from process import Run, clear, measure

HERE = Path(__file__).parent
CLI = Path(sys.executable).with_name("temporal-merge")
PEERS: dict[str, Collection[str]] = {
    "mergekit": peers_mergekit.METHODS,
    "fusionbench": peers_fusionbench.METHODS,
}


class Bench:
    """The measurements of one command: its inputs, its interpreters, its place for outputs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.work / "out"
        self.peers = {name: getattr(args, name) for name in PEERS if getattr(args, name)}
        self.tiny = make_inputs(args.work, "tiny", 2, args.threads)
        self.inputs = make_inputs(args.work, args.size, args.experts, args.threads)

    def case(self, case: Case) -> dict[str, list[dict[str, Any]]]:
        """Every run of every contender, by contender. One that failed is not tried again."""
        for contender in self._contenders(case):  # now all are in the page cache, and what is compiled is
            self._run(contender, case, self.tiny)
        for kept in self.inputs.base.parent.glob("*.limits.json"):
            kept.unlink()
        if case.prepared:
            self._run("ours", case, self.inputs)
        runs: dict[str, list[dict[str, Any]]] = {}
        for repeat in range(self.args.repeats):
            for contender in self._contenders(case):
                earlier = runs.setdefault(contender, [])
                if earlier and earlier[-1]["failure"]:
                    continue
                run = self._run(contender, case, self.inputs)
                print(
                    f"{case.name} {repeat + 1}/{self.args.repeats} {contender}: {report.one(run)}", flush=True
                )
                earlier.append(run.as_json())
        return runs

    def start_up(self) -> dict[str, list[dict[str, Any]]]:
        """Time before anything is merged, and the additional time of the first merge after installing."""
        base, experts = str(self.tiny.base), [str(path) for path in self.tiny.experts]
        out = clear(self.out) / "merged.safetensors"
        merge = _command(CASES["ties"], base, experts, out, self.args.threads)
        self._run(
            "ours", CASES["ties"], self.tiny
        )  # compiles, so that only the last of the three finds nothing
        measure(merge, self.args.threads, self.args.timeout, expect_json=False)  # Python's bytecode
        runs: dict[str, list[dict[str, Any]]] = {"help": [], "tiny": [], "tiny, nothing compiled": []}
        for _ in range(self.args.repeats):
            with tempfile.TemporaryDirectory(dir=self.args.work) as empty:
                for name, command, more in (
                    ("help", [CLI, "merge", "--help"], {}),
                    ("tiny", merge, {}),
                    ("tiny, nothing compiled", merge, {"NUMBA_CACHE_DIR": empty}),
                ):
                    run = measure(command, self.args.threads, self.args.timeout, more, expect_json=False)
                    runs[name].append(run.as_json())
        return runs

    def _contenders(self, case: Case) -> list[str]:
        # there is no command to fold
        command_line = ["cli"] if case.form == "merge" and self.args.cli else []
        return ["limit", "ours", *command_line, *(peer for peer in self.peers if case.name in PEERS[peer])]

    def _run(self, contender: str, case: Case, inputs: Inputs) -> Run:
        base, experts = case.checkpoints(str(inputs.base), [str(path) for path in inputs.experts])
        read = [path for path in (base, *experts) if path]
        inputs.warm([Path(path) for path in read])
        directory = clear(self.out)
        out, threads = directory / "model.safetensors", self.args.threads
        job = case.job(self.tiny) | {"base": base, "experts": experts, "out": str(out), "threads": threads}
        if contender == "limit":
            job = {"inputs": read, "out": str(out), "threads": threads}
            command = [sys.executable, HERE / "limit.py", json.dumps(job)]
        elif contender == "ours":
            command = [sys.executable, HERE / "ours.py", json.dumps(job)]
        elif contender == "cli":
            command = _command(case, base, experts, out, threads)
        else:
            command = [self.peers[contender], HERE / f"peers_{contender}.py", json.dumps(job)]
        most = int(self.args.memory * 2**30) if self.args.memory else None
        run = measure(command, threads, self.args.timeout, expect_json=contender != "cli", memory=most)
        if not run.failure and contender != "limit" and out.stat().st_size < 0.99 * inputs.nbytes:
            run.failure = f"wrote only {out.stat().st_size} bytes"
        clear(directory)
        return run


def _command(case: Case, base: str | None, experts: list[str], out: Path, threads: int) -> list[Any]:
    words: list[Any] = [
        CLI,
        "merge",
        "--technique",
        case.technique,
        "--out",
        out,
        "--threads",
        str(threads),
        "--force",
        "--no-compare",
    ]
    words += ["--base", base] if base else []
    for name, value in case.params.items():
        words += ["--set", f"{name}={value}"]
    return [*words, *case.flags, *experts]


def versions(args: argparse.Namespace) -> dict[str, Any]:
    """Of the other tools and what they stand on."""
    found = {}
    for peer in PEERS:
        if python := getattr(args, peer):
            words = [python, HERE / f"peers_{peer}.py", "--versions"]
            found[peer] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return found


def wanted_cases(asked: str | None) -> list[Case]:
    """The cases asked for; those whose technique this version does not have are left out with a notice."""
    names = asked.split(",") if asked else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"no such technique: {', '.join(unknown)}; there are {', '.join(CASES)}")
    answer = subprocess.run([CLI, "techniques", "--json"], capture_output=True, text=True, check=True)
    ours = {technique["name"] for technique in json.loads(answer.stdout)}
    for name in names:
        if CASES[name].technique not in ours:
            print(f"{name}: left out, this version of temporal-merge does not have {CASES[name].technique}")
    return [CASES[name] for name in names if CASES[name].technique in ours]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--techniques", metavar="a,b,...", help=f"default: {','.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of every contender")
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter that has mergekit")
    parser.add_argument("--fusionbench", metavar="PYTHON", help="an interpreter that has fusion-bench")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has both")
    parser.add_argument("--compare", action="store_true", help="compare the values of the results as well")
    parser.add_argument(
        "--start-up", action="store_true", help="measure how long the command takes to start as well"
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="end a run that takes more; default: 95 %% of what is free",
    )
    parser.add_argument("--no-cli", dest="cli", action="store_false", help="leave out the command line")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds, for each run")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench")
    record.add_json(parser)
    args = parser.parse_args(arguments)
    for peer in PEERS:
        setattr(args, peer, getattr(args, peer) or args.peers)
    return args


def main() -> None:
    """Measure, print, save."""
    args = parse()
    wanted = wanted_cases(args.techniques)
    bench = Bench(args)
    settings = {name: getattr(args, name) for name in ("size", "experts", "threads", "repeats", "memory")}
    settings["checkpoint_bytes"] = bench.inputs.nbytes
    found: dict[str, Any] = {"start_up": bench.start_up()} if args.start_up else {}
    found["cases"] = {}
    for case in wanted:
        runs = bench.case(case)
        found["cases"][case.name] = {"summary": report.summary(runs), "runs": runs}
    if args.compare:
        found["comparison"] = compare(bench.inputs, bench.peers, args.threads, bench.out)
    print(report.tables(settings, found))
    record.save(args.json, settings, found, **versions(args))


if __name__ == "__main__":
    main()
