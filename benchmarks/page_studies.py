"""The figures of whole studies (reports, tracking, what `storage.keep` costs), of folders, and of merges that see data. `page.py` puts them
on the pages.

Invariant: as of `page.py`.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

from report import table

MB = 1e6
ARRIVALS = (
    "technique",
    "early arrival, CPU ms",
    "late / early: CPU",
    "bytes read",
    "bytes written",
    "memory",
)
"""The columns of what a late arrival costs beside an early one."""

NAMED = {
    "base → all": "TIES of all, from the base",
    "latest → latest": "continual fine-tuning",
    "ema → ema": "`best_in_time`",
}
"""How the page of adapters calls the strategies of its study."""


def sweep_report(file: dict[str, Any]) -> str:
    """A report of a large study."""
    found = file["found"]
    return (
        f"`temporal-merge report` over the {found['trajectories']} trajectories of `configs/{file['settings']['study']}`, with invented scores: "
        f"{found['cpu']:.1f} s of CPU for a page of {found['html_bytes'] / MB:.1f} MB with {found['figures']} figures."
    )


def sweep_tracking(file: dict[str, Any]) -> str:
    """What MLflow costs a sweep."""
    found = file["found"]
    return (
        f"Recording and delivering {found['rows']:,} rows of a sweep of {found['trajectories']} trajectories ({found['models']:,} models) takes "
        f"{found['milliseconds per model']:.1f} ms of CPU per model, and in all {100 * found['share of the sweep']:.1f} % of what its steps take "
        "where they are as long as the demo's."
    )


def keep(file: dict[str, Any]) -> str:
    """One study under each choice of `storage.keep`."""
    found, settings = file["found"], file["settings"]
    rows = []
    for name, runs in found["runs"].items():
        one = {what: median(run[what] for run in runs) for what in runs[0]}
        more = one["disk"] / (one["train"] + one["base"]) - 1
        rows.append(
            [
                f"`{name}`",
                f"{one['wall']:.0f}",
                f"{one['cpu']:.0f}",
                f"{one['disk'] / MB:,.0f}",
                f"{100 * more:.1f} %",
            ]
        )
    ratios = {name: median(of["wall"]) for name, of in found["ratios"].items()}
    first = next(iter(found["runs"]))
    said = "; ".join(
        f"`{name}` takes {ratio:.2f} times the wall time of `{first}`" for name, ratio in ratios.items()
    )
    cut = ", ".join(f"`{one}`" for one in settings["set"])
    return (
        f"`configs/{settings['study']}` with {cut}: {found['checkpoints']} checkpoints, results and every sha256 equal. Medians of "
        f"{len(next(iter(found['runs'].values())))} alternating runs: {said}.\n\n"
    ) + table(("`keep`", "wall, s", "CPU of the steps, s", "store, MB", "more than experts and base"), rows)


def packed(file: dict[str, Any]) -> str:
    """Experts as their differences from the base."""
    experts = file["found"]["experts"]
    ratios = sorted(one["before"] / one["after"] for one in experts)
    whole = sum(one["before"] for one in experts) / sum(one["after"] for one in experts)
    return (
        f"`temporal-merge pack` of `{file['settings']['run']}`: {len(experts)} experts of {experts[0]['before'] / MB:.1f} MB become {ratios[0]:.1f} to "
        f"{ratios[-1]:.1f} times smaller, {whole:.1f} times together, in {file['found']['cpu']:.1f} s of CPU."
    )


def small_disk(file: dict[str, Any]) -> str:
    """A study of ViT-B/16's size on a disk of the size that its plan states."""
    found = file["found"]
    steps, size = found["steps"], found["checkpoint"]
    more = found["disk"] / size - 1 - steps["train"]
    return (
        f"A study of a ViT-B/16 for pictures of 32 px with random weights ({size / 1e9:.2f} GB a checkpoint; {steps['train']} experts, {steps['merge']} merges, "
        f"{steps['evaluate']} evaluations) on a file system of {found['disk'] / 1e9:.2f} GB, what `plan` states for `keep: none`: base, experts and {more:.0f} checkpoints more. The study is "
        f"refused with `keep: all` (exit code {found['keep all']['exit']}), finished with `keep: none`, which left "
        f"{found['keep none']['disk'] / 1e9:.2f} GB in the store."
    )


def folders(file: dict[str, Any]) -> str:
    """Folders of a language model, ours beside mergekit."""
    had, machine = file["settings"], file["machine"]
    rows = []
    for name, runs in file["found"]["methods"].items():
        cells = [f"`{name}`"]
        for key, unit in (("wall", 1), ("cpu", 1), ("peak", 1 << 20)):
            ours, theirs = (median(run[key] for run in runs[who]) / unit for who in ("ours", "mergekit"))
            cells += [f"{ours:,.0f} / {theirs:,.0f}", f"{theirs / ours:.1f}"]
        rows.append(cells)
    said = (
        f"Two experts of a Llama of {had['bytes'] / 1e9:.1f} GB in bfloat16, {had['threads']} threads, medians of {had['repeats']} whole "
        f"processes with their imports, at nice {had['priority']} on a machine of {machine['cores']} cores of which other processes used "
        f"{machine['cores_used_by_others']:.1f} meanwhile; mergekit {file['versions'].get('mergekit', {}).get('mergekit', '')}."
    )
    columns = ("method", "wall, s: ours / mergekit", "times", "CPU, s", "times", "peak, MiB", "times")
    return f"{said}\n\n{table(columns, rows)}"


def gates(file: dict[str, Any]) -> str:
    """What the gates of a service say of honest and of poisoned experts."""
    from service_gates import OTHER, summary, under_defaults

    settings, rows = file["settings"], [one for one in file["found"]["rows"] if one["kind"] != OTHER]
    seeds, tasks = len(settings["seeds"]), len(settings["tasks"])
    said = f"{len(rows)} experts of tiny-clip: {seeds} seeds, {tasks} tasks, the gates of `configs/{settings['config']}`."
    found = under_defaults(rows)
    default = (
        f"With the margins that a configuration has by default, {found['passed']} of the {found.total()} honest experts would have passed, "
        f"{found['undecided']} would have been held as undecided, and {found['failed']} rejected."
    )
    return f"{said}\n\n{summary(rows)}\n\n{default}"


def gates_of_tasks(file: dict[str, Any]) -> str:
    """What the gates of a service say of honest experts that are sent for another task."""
    from service_gates import HONEST, summary

    return summary([one for one in file["found"]["rows"] if one["kind"] != HONEST])


def arrivals_statistics(file: dict[str, Any]) -> str:
    """The last arrivals over the first ones, of techniques that see data."""
    had, rows = file["settings"], []
    for name, one in sorted(file["found"].items()):
        ratios = [f"{one['ratios'][key]:.3f}" for key in ("read", "written", "memory")]
        rows.append(
            [f"`{name}`", f"{1e3 * median(one['early']['cpu']):.1f}", f"{one['ratios']['cpu']:.2f}", *ratios]
        )
    said = (
        f"With statistics: {had['experts']} experts of {had['checkpoint_bytes']:,} bytes; the last {had['span']} arrivals beside arrivals 2 to "
        f"{had['span'] + 1} of a new stream, medians of {had['span']} pairs."
    )
    return f"{said}\n\n{table(ARRIVALS, rows)}"


def evidence(file: dict[str, Any]) -> str:
    """What measuring an expert costs, beside the published ways."""
    had, found = file["settings"], file["found"]
    rows = []
    for name, one in found.items():
        if not name.startswith("measure") or not one.get("answer"):
            continue
        answer = one["answer"]
        size = f"{answer['bytes'] / MB:,.0f}" if answer["bytes"] else "-"
        ratio = f"{answer['seconds'] / answer['forward']:.1f}"
        rows.append(
            [
                name.removeprefix("measure "),
                f"{answer['seconds']:.0f}",
                ratio,
                f"{one['peak'] / MB:,.0f}",
                size,
            ]
        )
    said = (
        f"{had['images']} images (for `gram` as many captions too), random weights of {had['size']}'s shapes ({found['checkpoint_bytes'] / MB:,.0f} MB), "
        f"{had['threads']} thread(s):"
    )
    return f"{said}\n\n{table(('statistic', 'CPU seconds', 'of a forward pass over the same inputs', 'peak, MB', 'file, MB'), rows)}"


def regmean(file: dict[str, Any]) -> str:
    """RegMean of image towers beside FusionBench's."""
    had, found, machine = file["settings"], file["found"], file["machine"]
    rows = []
    for name, label in (("ours", "temporal-merge"), ("fusionbench", "FusionBench")):
        runs = found["runs"][name]
        seconds = [f"{median(run['answer'][key] for run in runs):.0f}" for key in ("seconds", "merge_cpu")]
        rows.append([label, *seconds, f"{median(run['peak'] for run in runs) / MB:,.0f}"])
    ratios = [f"{median(found['ratios'][key]):.2f}" for key in ("wall", "cpu", "peak")]
    rows.append(["ours / FusionBench, median of rounds", *ratios])
    said = (
        f"{had['experts']} image towers of {had['size']}'s shapes ({had['checkpoint_bytes'] / MB:,.0f} MB and {had['gram_bytes'] / MB:,.0f} MB of Gram "
        f"matrices each), {had['threads']} thread(s), {had['rounds']} alternating round(s); other processes used "
        f"{machine['cores_used_by_others']:.1f} of {machine['cores']} cores meanwhile; fusion-bench {file['versions']['fusionbench']['fusion-bench']}."
    )
    apart = f"The results differ by {found['difference']['relative']:.1g} of the merged task vector's length."
    return f"{said}\n\n{table(('', 'merge, s', 'CPU s', 'peak, MB'), rows)}\n\n{apart}"


def serving(file: dict[str, Any]) -> str:
    """What exchanging the served weights costs those who ask."""
    had, found, machine = file["settings"], file["found"], file["machine"]
    rows, asked = [], 0
    for name, phases in found["phases"].items():
        asked += sum(int(one["requests"]) for one in phases)
        one = {key: median(phase[key] for phase in phases) for key in phases[0]}
        times = [f"{1000 * one[key]:.0f}" for key in ("p50", "p99", "longest")]
        rows.append([name, f"{one['rate']:.0f}", *times, f"{one['memory'] / MB:,.0f}"])
    ratios = {key: median(values) for key, values in found["ratios"].items()}
    said = (
        f"{had['model']}, {had['workers']} process, {had['clients']} clients that ask again as soon as they have an answer, JPEGs of 640 x 480. "
        f"Phases of {had['seconds']:.0f} s without swaps and with {had['swaps']} alternate, {had['rounds']} of each; medians. Other work used "
        f"{machine['cores_used_by_others']:.1f} of {machine['cores']} cores meanwhile."
    )
    swap = median(phase["swap"] for phase in found["phases"]["with swaps"])
    apart = (
        f"With swaps the rate was {ratios['rate']:.2f} times that without, p99 {ratios['p99']:.2f} times, memory {ratios['memory']:.2f} times; no "
        f"request of {asked:,} failed. Between the new head and the first answer by it lay {swap:.1f} s, of which up to 0.2 s are the head's poll."
    )
    return f"{said}\n\n{table(('', 'requests/s', 'p50, ms', 'p99, ms', 'longest, ms', 'memory, MB'), rows)}\n\n{apart}"


def adapters(file: dict[str, Any]) -> str:
    """Experts that are adapters beside whole models."""
    had, found, machine = file["settings"], file["found"], file["machine"]
    small, whole = (found["arrivals"][kind] for kind in ("adapters", "whole models"))
    said = (
        f"One run of `configs/{had['study']}` at {had['steps']} steps, one seed, `recipe.adapter: [null, {had['adapter']}]` (the learning rate is that for "
        f"adapters, too high for whole models): an arrival is {small['bytes'] / 1e3:.0f} kB in the place of {whole['bytes'] / MB:.1f} MB, "
        f"{whole['bytes'] / small['bytes']:.0f} times smaller. Training ran at {small['samples_per_second']:,.0f} samples/s with adapters and at "
        f"{whole['samples_per_second']:,.0f} without (medians of {small['experts']} and {whole['experts']} experts, two at a time on "
        f"{machine['cores']} cores). A tiny model says nothing about scores of yours."
    )
    by_strategy: dict[str, dict[str, str]] = {}
    for one in found["scores"]:
        text = " / ".join(f"{one[key]:.2f}".removeprefix("0") for key in ("ka", "zs", "gm"))
        by_strategy.setdefault(one["strategy"], {})[one["kind"]] = text
    rows = [
        [NAMED.get(name, name), texts["adapters"], texts["whole models"]]
        for name, texts in by_strategy.items()
    ]
    return f"{said}\n\n{table(('at the end: KA / ZS / GM', 'adapters', 'whole models'), rows)}"


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "folders": ("merge-folders", folders),
    "sweep-report": ("study-report", sweep_report),
    "sweep-tracking": ("tracking", sweep_tracking),
    "keep": ("storage-sweep", keep),
    "packed": ("pack", packed),
    "small-disk": ("storage-small-disk", small_disk),
    "service-gates": ("service-gates", gates),
    "service-gates-tasks": ("service-gates-tasks", gates_of_tasks),
    "arrivals-statistics": ("statistics-arrivals", arrivals_statistics),
    "evidence": ("evidence-vit-b-32", evidence),
    "serving": ("serving", serving),
    "adapters": ("adapters", adapters),
    "regmean": ("regmean-vit-b-16", regmean),
}
"""The file of results that each block is made from, and how."""
