"""The figures of docs/performance.md, and those on other pages (`PAGES`), out of the files in results/.

    python benchmarks/page.py          # writes the pages' blocks anew

A block stands between `<!-- figures: NAME -->` and `<!-- end -->`; everything else on the page of performance is written by hand
and states no measured number.

Invariant: a block is a function of the committed results alone, so a test can tell a figure that nobody measured.
"""

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import page_studies
from record import RESULTS, ROOT
from report import table

PAGE = ROOT / "docs" / "performance.md"
PAGES = (
    PAGE,
    *(ROOT / "docs" / f"{name}.md" for name in ("fomo_in_flux", "storage", "service", "serving", "adapters")),
)
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MIB = 1 << 20
PEERS = ("mergekit", "fusionbench")
NAMES = {"mergekit": "mergekit", "fusionbench": "FusionBench"}


def read(name: str) -> dict[str, Any]:
    """One file of results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def written(text: str) -> str:
    """The page with every block as the results have it. Raises KeyError for a block that nobody makes."""
    return BLOCK.sub(lambda found: f"{found[1]}{_block(BLOCKS[found[2]])}\n{found[3]}", text)


def _block(make: Callable[[], str]) -> str:
    try:
        return "\n\n".join(one if one.startswith("|") else _filled(one) for one in make().split("\n\n"))
    except FileNotFoundError as error:
        return f"Not measured yet: `benchmarks/all.sh` makes `{Path(error.filename).relative_to(ROOT)}`."


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 138, break_long_words=False, break_on_hyphens=False)


def n(value: float) -> str:
    """Two digits, three from a hundred on; thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# --- merging --------------------------------------------------------------------------------------------------------


def merge_limit() -> str:
    """Merges of four experts beside reading every input once and writing one output."""
    return _limit("merge-limit")


def merge_limit_8() -> str:
    """The same of eight."""
    return _limit("merge-limit-8")


def _limit(result: str) -> str:
    rows, threads = [], read(result)["settings"]["threads"]
    for name, case in _cases(result).items():
        ours, limit = case["ours"], case["limit"]
        cells = [limit["merge_cpu"], ours["merge_cpu"]]
        busy = ours["merge_cpu"] / ours["unsynced"] / threads
        ratios = [case["to_limit"][key] for key in ("merge_cpu", "unsynced")]
        rows.append(
            [
                f"`{name}`",
                *map(n, cells),
                *(f"{r:.1f}" for r in ratios),
                f"{busy:.2f}",
                f"{ours['peak'] / MIB:.0f}",
            ]
        )
    columns = (
        "technique",
        "limit, CPU s",
        "merge, CPU s",
        "ratio of CPU",
        "ratio of wall",
        "cores busy",
        "peak, MiB",
    )
    return f"{_said(result)}\n\n{table(columns, rows)}"


def merge_peers() -> str:
    """Merges beside those of other tools."""
    rows = []
    for name, case in _cases("merge-peers").items():
        ours = case["ours"]
        row = [f"`{name}`", n(ours["merge_cpu"])]
        for peer in PEERS:
            row += _beside(case.get(peer))
        peaks = [ours, *(case.get(peer) for peer in PEERS)]
        rows.append(
            [*row, ", ".join(f"{one['peak'] / MIB:,.0f}" if one and "peak" in one else "-" for one in peaks)]
        )
    columns = ["technique", "ours, CPU s"]
    for peer in PEERS:
        columns += [NAMES[peer], "times"]
    return f"{_said('merge-peers')}\n\n{table([*columns, 'peak, MiB: ours, mergekit, FusionBench'], rows)}"


def _beside(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["-", ""]
    if "failure" in found:
        return [found["failure"], ""]
    return [n(found["merge_cpu"]), f"{found['cpu_over_cpu']:.1f}"]


def agreement() -> str:
    """Whether the tools compute the same."""
    rows = [
        [
            name,
            f"{found['elements']:,}",
            f"{found['differing']:,}",
            f"{found['largest']:.2g}",
            f"{found['relative']:.2g}",
        ]
        for name, found in read("merge-agreement")["found"]["comparison"].items()
    ]
    return table(
        ("technique, tool", "elements", "differing", "largest difference", "relative to the task vector"),
        rows,
    )


def memory() -> str:
    """Peak anonymous memory by the number of experts."""
    files = [read(f"merge-{name}") for name in ("memory-2", "limit", "memory-8")]
    cases = {file["settings"]["experts"]: _summaries(file) for file in files}
    names = [name for name in _summaries(files[0]) if all(name in of for of in cases.values())]
    rows = [
        [f"{count} experts", *(f"{of[name]['ours']['peak'] / MIB:.0f}" for name in names)]
        for count, of in cases.items()
    ]
    return table(("MiB", *(f"`{name}`" for name in names)), rows)


def start_up() -> str:
    """What the command takes before anything is merged."""
    runs = read("merge-start-up")["found"]["start_up"]
    cpu = {name: median(run["cpu"] for run in of) for name, of in runs.items()}
    return (
        f"`temporal-merge merge --help` takes {n(cpu['help'])} s of CPU, a TIES merge of two tiny checkpoints {n(cpu['tiny'])} s. "
        f"The first merge after installing compiles its loops\nand takes {n(cpu['tiny, nothing compiled'])} s; they are kept beside the "
        "package (or in `NUMBA_CACHE_DIR`)."
    )


def _cases(name: str) -> dict[str, Any]:
    return _summaries(read(name))


def _summaries(file: dict[str, Any]) -> dict[str, Any]:
    return {name: case["summary"] for name, case in file["found"]["cases"].items()}


def _said(name: str) -> str:
    """On what, how often, and how busy the machine was."""
    file = read(name)
    had, others = file["settings"], file["machine"]["cores_used_by_others"]
    said = f"{had['experts']} experts of {had['checkpoint_bytes'] / MIB:.0f} MiB, {had['threads']} thread(s), medians of {had['repeats']}"
    return f"{said}; other processes used {others:.1f} of {file['machine']['cores']} cores meanwhile."


# --- streams --------------------------------------------------------------------------------------------------------


def arrivals() -> str:
    """The thousandth arrival over the second, of every technique that streams."""
    paths = sorted(RESULTS.glob("arrivals-*.json")) or [RESULTS / "arrivals-ties.json"]
    files = [json.loads(path.read_text()) for path in paths]
    rows, grown, had = [], set(), files[0]["settings"]
    for name, of in sorted(pair for file in files for pair in file["found"].items()):
        ratios, early = of["ratios"], of["early"]
        cells = [f"{ratios['cpu']:.2f}", *(f"{ratios[key]:.3f}" for key in ("read", "written", "memory"))]
        span = len(early["cpu"])
        grown.add((of["late"]["written"][0] - early["written"][0]) / (had["experts"] - span - 1))
        rows.append([f"`{name}`", n(median(early["cpu"]) * 1e3), *cells])
    from arrivals import streaming

    said = (
        f"{len(rows)} of the {len(streaming())} techniques that stream; {had['experts']:,} experts of {had['checkpoint_bytes']:,} bytes; arrivals {had['experts'] - span + 1} to {had['experts']:,} beside arrivals "
        f"2 to {span + 1} of a new stream, medians of {span} pairs.\nEach arrival adds at most {max(grown):.0f} bytes to what the next one writes: "
        "its name in the list of experts, whatever the model's size."
    )
    return f"{said}\n\n{table(page_studies.ARRIVALS, rows)}"


# --- studies --------------------------------------------------------------------------------------------------------


def overhead() -> str:
    """What driver, Ray and MLflow add to the steps."""
    found = read("orchestration-overhead")["found"]
    sums, steps = found["sums"], found["runs"][0]["run"]["steps"]
    whole, alone = sums["run"] / sums["bare"], sums["steps"] / sums["bare"]
    return (
        f"{len(found['runs'])} alternating run(s) of {steps} steps, CPU seconds of all processes, start-up left out: the orchestrated run takes {whole:.2f} times "
        f"what a bare\nloop over the same steps takes, and the steps alone take {alone:.2f} times that."
    )


def scale() -> str:
    """The driver over a thousand experts that do nothing."""
    file = read("orchestration-scale")
    found = file["found"]
    cpu, memory_ = found["cpu_ms"], found["memory_mib"]
    return (
        f"A stream of {file['settings']['experts']:,} tasks, {found['steps']:,} steps that only commit a tiny file, through the real driver, actors and store. The driver's CPU "
        f"time is {n(cpu[1])} ms per\nstep from step {found['window'] * 2} on and {n(cpu[-1])} ms at the end; its memory grows by {n(memory_[-1] - memory_[1])} MiB.\n\n![time and memory of the driver over a thousand experts](orchestration.png)"
    )


def plan() -> str:
    """What plans cost."""
    rows = []
    for name, label in (("plan-tasks", "{tasks:,} tasks, {trajectories:,} strategies"), ("plan-trajectories", "{trajectories:,} trajectories over {tasks:,} tasks")):  # fmt: skip
        file = read(name)
        first, again, status = (file["found"][part] for part in ("first", "again", "status"))
        cells = [f"{one['cpu']:.1f} s, {one['peak'] / MIB:,.0f} MiB" for one in (first, again, status)]
        rows.append(
            [
                label.format(**file["settings"]),
                f"{first['steps']:,}",
                *cells[:2],
                f"{first['bytes'] / 1e6:.0f} MB",
                cells[2],
            ]
        )
    return table(("", "steps", "first plan", "again", "plan.json", "`status`"), rows)


def tracker_down() -> str:
    """Training without a tracker."""
    file = read("tracker-down")
    ratios = file["found"]["ratios"]
    rows = [
        [what, *(spread(ratios[name][what]) for name in ("nobody", "silent"))] for what in ratios["silent"]
    ]
    rounds = file["settings"]["rounds"]
    return f"Ratios to the run whose tracker answers, median and range of {rounds} rounds.\n\n" + table(
        ("", "nobody at the address", "a server that accepts and never answers"), rows
    )


# --- training and evaluation ----------------------------------------------------------------------------------------


def train() -> str:
    """An expert in our worker beside a bare loop."""
    file = read("train")
    runs, had = file["found"]["runs"], file["settings"]
    rows = []
    for name, answers in runs.items():
        ratios = [
            median(b[key] / a[key] for a, b in zip(answers, runs["bare loop"]))
            for key in ("cpu_step", "cpu_whole")
        ]
        rate = median(had["batch_size"] / a["cpu_step"] for a in answers)
        whole = median(a["cpu_whole"] for a in answers)
        rows.append([name, f"{rate:,.0f}", f"{ratios[0]:.2f}", n(whole), f"{ratios[1]:.2f}"])
    said = f"An expert of {had['steps']} steps of {had['batch_size']}, {had['precision']}, {had['threads']} thread, medians of {had['rounds']} alternating runs."
    columns = ("", "samples per CPU second, steady", "bare / this", "whole expert, CPU s", "bare / this")
    return f"{said}\n\n{table(columns, rows)}"


def feed() -> str:
    """What reaches a device, beside a plain copy and torch's DataLoader."""
    file = read("feed")
    rounds, ratios, had = file["found"]["rounds"], file["found"]["ratios"], file["settings"]
    names = {
        "decoded_per_s": "decoded pool to a ready batch",
        "memcpy_per_s": "plain copy of as many bytes",
        "encoded_per_s": "pool as it is stored to a ready batch",
        "decoder_per_s": "its decoder and resize alone, from memory",
        "decode_only_per_s": "its decoder alone",
        "dataloader_per_s": "DataLoader with open_clip's transform, from JPEG",
    }
    rows = [[name, spread(rounds[key], 0)] for key, name in names.items()]
    said = (
        f"Pictures of 224 px a second, {had['cores']} threads or processes, {had['rounds']} alternating rounds. Decoded to copied: "
        f"{spread(ratios['decoded_to_memcpy'])}. Stored to its decoder and resize: {spread(ratios['encoded_to_decoder'])}; to its decoder "
        f"alone: {spread(ratios['encoded_to_decode_only'])}; to the DataLoader: {spread(ratios['encoded_to_dataloader'])}. A pretended device that takes {had['batch_size']} pictures every {had['takes']} s is busy "
        f"{spread(rounds['busy'])} of the time."
    )
    return f"{said}\n\n{table(('', 'pictures a second'), rows)}"


def pool() -> str:
    """A pool of many samples in many shards: what is done once, and what every process does."""
    file = read("pool")
    had, found = file["settings"], file["found"]
    parts = {
        "write_manifest": "sha256 of the shards and the manifest, once",
        "plan": "plan of a study that replays the pool, the costs of its model known",
        "index": "index, once",
        "open": "opening the index, in each process",
        "batch": f"first batch of {had['batch_size']}",
    }
    rows = [
        [name, n(found[part]["seconds"]), n(found[part]["cpu"]), f"{found[part]['peak'] / MIB:.0f}"]
        for part, name in parts.items()
    ]
    said = (
        f"{had['samples']:,} samples in {had['shards']:,} shards ({had['distinct']} different ones, repeated by links), "
        f"{found['index']['bytes'] / 1e6:,.0f} MB of index. "
        f"An expert of {had['steps']} steps was ended after step {had['steps'] // 2} and resumed: the bytes of its weights are "
        f"{'the same' if found['resume']['same'] else 'NOT the same'} as without."
    )
    return f"{said}\n\n{table(('', 'seconds', 'CPU seconds', 'peak memory, MiB'), rows)}"


def evaluate() -> str:
    """Scores beside clip_benchmark's, for the tiny model and for a tower that people use."""
    rows, compared, differing = [], 0, 0
    for name in ("evaluate-tiny", "evaluate-vit-b-16"):
        file = read(name)
        runs, had = file["found"]["runs"], file["settings"]
        compared += file["found"]["equal"]["compared"]
        differing += len(file["found"]["equal"]["differing"])
        for contender, answers in runs.items():
            cpu = median(answer["cpu"] for answer in answers)
            times = median(b["cpu"] / a["cpu"] for a, b in zip(answers, runs["clip_benchmark"]))
            peak = median(answer["peak"] for answer in answers) / MIB
            least = (
                median(a["limit"] for a in answers) * had["checkpoints"] if "limit" in answers[0] else None
            )
            share = "" if least is None else f"{least / cpu:.2f}"
            label = f"{had['model']}: {had['checkpoints']} checkpoint(s), {had['images']:,} images"
            rows.append(
                [
                    label,
                    contender,
                    n(cpu),
                    f"{times:.1f}" if contender != "ours, fraction 0.1" else "",
                    share,
                    f"{peak:,.0f}",
                ]
            )
    columns = ("", "", "CPU s", "clip_benchmark / this", "share of the two towers alone", "peak, MiB")
    said = f"{compared - differing} of {compared} scores equal those that clip_benchmark writes."
    return f"{table(columns, rows)}\n\n{said}"


# --- plans of large studies -------------------------------------------------------------------------------------------


def fomo_costs() -> str:
    """A step of each model, counted on fake tensors, and how many the budget buys."""
    file = read("fomo-costs")
    had = file["settings"]
    rows = []
    for name, of in file["found"]["models"].items():
        steps = round(float(had["total_gflops"]) / 20 / of["gflops_per_step"])
        cells = [
            f"{of['gflops_per_step']:,.0f}",
            f"{steps:,}",
            f"{of['weights_bytes'] / 1e9:.2f} GB",
            f"{of['peak_bytes'] / 1e9:.0f} GB",
        ]
        rows.append([name, *cells])
    return table(
        (
            "model",
            "GFLOPs per step",
            "steps per task, 20 tasks",
            "a checkpoint",
            "estimated memory of a step",
        ),
        rows,
    )


def fomo_disk() -> str:
    """What is stored of each study."""
    plans = read("fomo-costs")["found"]["plans"]
    each = ", ".join(f"{of['disk_bytes'] / 1e12:.2g} TB for `{name}`" for name, of in plans.items())
    return f"Disk for what is stored, as planned: {each}."


def machine() -> str:
    """What everything was measured on."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.rglob("*.json"))]
    cpus = sorted(
        {
            f"{file['machine']['cpu']}, {file['machine']['cores']} cores, {file['machine']['memory_gib']} GiB"
            for file in files
        }
    )
    others = [file["machine"]["cores_used_by_others"] for file in files]
    dates = sorted(file["date"][:10] for file in files)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    named = ("torch", "numpy", "numba", "ray", "mlflow", "open_clip_torch")
    versions = ", ".join(f"{name} {files[-1]['versions'][name]}" for name in named)
    return (
        f"Measured {when} on {'; '.join(cpus)}; Python {files[-1]['versions']['python']}, {versions}.\nOther processes used {min(others):.1f} to "
        f"{max(others):.1f} cores while something was measured, so read the CPU seconds and the ratios."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        machine, merge_limit, merge_limit_8, merge_peers, agreement, memory, start_up, arrivals, overhead, scale, plan, tracker_down, train,
        feed, pool, evaluate, fomo_costs, fomo_disk,
    )
}  # fmt: skip
BLOCKS |= {
    name: lambda result=result, make=make: make(read(result))
    for name, (result, make) in page_studies.BLOCKS.items()
}


def main() -> None:
    """Write the pages."""
    for page in PAGES:
        page.write_text(written(page.read_text()))
        print(page)


if __name__ == "__main__":
    main()
