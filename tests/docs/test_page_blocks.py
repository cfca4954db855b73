"""Every block of the pages can be made from the output of the benchmarks; here from invented runs of the same form."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.world import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import page
import report
from train import CONTENDERS

MIB = 1 << 20
MACHINE = {"cpu": "Some Processor", "cores": 2, "memory_gib": 8.0, "cores_used_by_others": 1.5}
VERSIONS: dict[str, Any] = dict.fromkeys(
    ("python", "torch", "numpy", "numba", "ray", "mlflow", "open_clip_torch"), "1.0"
)
VERSIONS["fusionbench"] = {"fusion-bench": "1.0"}


def run(cpu: float, seconds: float, **more: Any) -> dict[str, Any]:
    """As `process.Run.as_json` with the answer of `ours.py`."""
    answer = {"seconds": seconds, "merge_cpu": cpu, "import": 0.5, "load": 0.1, **more}
    return {"wall": seconds + 1, "cpu": cpu + 1, "peak": 80 * MIB, "answer": answer, "failure": None}


def cases(*peers: str) -> dict[str, Any]:
    """Of one technique: ours takes twice the limit's CPU seconds, the others four times ours; FusionBench had no room."""
    limit = {"wall": 1, "cpu": 1, "peak": MIB, "answer": {"map 1 MiB": [0.2, 0.1, 0.25]}, "failure": None}
    runs = {"limit": [limit], "ours": [run(0.5, 0.4, sync=0.1)]}
    runs |= {peer: [run(2.0, 3.0)] for peer in peers}
    if "fusionbench" in peers:
        runs["fusionbench"][0] |= {"answer": {}, "failure": "took more than the 8192 MiB that it might"}
    return {"average": {"summary": report.summary(runs), "runs": runs}}


def arrival(cpu: float, size: int) -> dict[str, list[float]]:
    return {
        "cpu": [cpu] * 2,
        "seconds": [cpu] * 2,
        "read": [size] * 2,
        "written": [size] * 2,
        "memory": [MIB] * 2,
    }


def invented() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Settings and results by file name."""
    merged = {"size": "tiny", "threads": 2, "repeats": 1, "memory": None, "checkpoint_bytes": 4 * MIB}
    started = {name: [{"wall": 1, "cpu": 0.2, "peak": MIB, "answer": {}, "failure": None}] for name in ("help", "tiny", "tiny, nothing compiled")}  # fmt: skip
    differing = {"elements": 10, "differing": 1, "fraction": 0.1, "largest": 1e-7, "relative": 1e-6}
    streams = {"ratios": {"cpu": 1.0, "read": 1.01, "written": 1.01, "memory": 1.0, "seconds": 1.0}}
    trained = {
        "samples": 640,
        "loss": 1.0,
        "cpu_step": 0.05,
        "cpu_whole": 3.0,
        "wall_step": 0.05,
        "wall_whole": 3.0,
    }
    scored = {"cpu": 5.0, "wall": 6.0, "cpu_first": 1.0, "cpu_later": 1.0, "peak": MIB, "images": 8}
    evaluated = {
        "runs": {"ours, nothing decoded": [scored], "ours": [scored | {"limit": 4.0}], "clip_benchmark": [scored | {"cpu": 20.0}]},
        "equal": {"compared": 2, "differing": [], "ours_same_in_every_process": True},
    }  # fmt: skip
    planned = {"seconds": 1, "cpu": 1.0, "steps": 7999, "bytes": 6_000_000, "write": 1, "peak": 900 * MIB}
    ratios = {what: [0.9, 1.0, 1.1] for what in ("training, wall", "training, CPU", "all steps, wall")}
    overhead = {"bare": {"cpu": 10.0}, "run": {"steps": 49}}
    return {
        "merge-limit": (merged | {"experts": 4}, {"cases": cases()}),
        "merge-limit-8": (merged | {"experts": 8}, {"cases": cases()}),
        "study-report": ({"study": "sweep.yaml"}, {"trajectories": 248, "cpu": 9.8, "html_bytes": 1_700_000, "figures": 13}),
        "tracking": ({"trajectories": 288}, {"rows": 9582, "trajectories": 300, "models": 2156, "milliseconds per model": 6.0, "share of the sweep": 0.004}),
        "storage-sweep": ({"study": "sweep.yaml", "set": ["grid.seed=[0]"]}, {"checkpoints": 90, "runs": {name: [{"wall": 60.0, "cpu": 80.0, "disk": disk, "train": 9e7, "base": 1e7}] for name, disk in (("all", 3e8), ("none", 1.02e8))}, "ratios": {"none": {"wall": [0.99], "cpu": [1.0], "disk": [0.34]}}}),
        "storage-small-disk": ({"small_disk": 2}, {"disk": 4_000_000_000, "checkpoint": 598_482_948, "steps": {"train": 3, "merge": 4, "evaluate": 9}, "keep all": {"exit": 2}, "keep none": {"disk": 2_400_000_000}}),
        "service-gates-tasks": ({"seeds": [0]}, {"rows": [{"kind": "expert of another task", "status": "quarantined", "reasons": ["solo.no_gain"]}]}),
        "service-gates": ({"seeds": [0], "tasks": ["letters"], "config": "service.yaml"}, {"rows": [{"kind": "honest", "status": "accepted", "reasons": [], "gates": {"drift": ["pass", 0.0, -0.01, 0.01]}}, {"kind": "noise", "status": "quarantined", "reasons": ["solo.no_gain"]}]}),
        "merge-memory-2": (merged | {"experts": 2}, {"cases": cases()}),
        "merge-memory-8": (merged | {"experts": 8}, {"cases": cases()}),
        "merge-peers": (merged | {"experts": 4}, {"cases": cases("mergekit", "fusionbench")}),
        "merge-start-up": (merged | {"experts": 2}, {"start_up": started, "cases": cases()}),
        "merge-agreement": (merged | {"experts": 4}, {"cases": {}, "comparison": {"average, mergekit": differing}}),
        "arrivals-ties": ({"experts": 1000, "checkpoint_bytes": 4000}, {"ties": streams | {"early": arrival(0.01, 9000), "late": arrival(0.01, 32928)}}),
        "regmean-vit-b-16": (
            {"experts": 8, "size": "vit-b-16", "checkpoint_bytes": 4e8, "gram_bytes": 9e8, "threads": 1, "rounds": 1},
            {"runs": {name: [{"answer": {"seconds": seconds, "merge_cpu": 9.0}, "peak": 3e9}] for name, seconds in (("ours", 10.0), ("fusionbench", 20.0))},
             "ratios": {"wall": [0.5], "cpu": [1.0], "peak": [1.0]}, "difference": {"relative": 1e-6}},
        ),
        "pack": ({"run": "demo"}, {"cpu": 2.0, "experts": [{"before": 14_000_000, "after": 7_000_000}, {"before": 14_000_000, "after": 10_000_000}]}),
        "serving": (
            {"model": "tiny-clip", "workers": 1, "clients": 8, "seconds": 20, "swaps": 33, "rounds": 1},
            {"phases": {name: [{"requests": 100, "rate": 50.0, "p50": 0.1, "p99": 0.2, "longest": 0.3, "swaps": swaps, "swap": 0.5, "memory": 6e8}] for name, swaps in (("without swaps", 0), ("with swaps", 33))},
             "ratios": {"rate": [0.9], "p99": [1.2], "memory": [1.0]}},
        ),
        "adapters": (
            {"study": "lora.yaml", "steps": 40, "adapter": "{rank: 8}"},
            {"arrivals": {kind: {"experts": 9, "bytes": size, "samples_per_second": 100.0} for kind, size in (("adapters", 2e5), ("whole models", 1e7))},
             "scores": [{"kind": kind, "strategy": "latest → latest", "ka": 0.25, "zs": 0.5, "gm": 0.354} for kind in ("adapters", "whole models")]},
        ),
        "statistics-arrivals": ({"experts": 200, "checkpoint_bytes": 4000, "span": 10}, {"regmean": streams | {"early": arrival(0.01, 9000), "late": arrival(0.01, 9000)}}),
        "evidence-vit-b-32": ({"size": "vit-b-32", "images": 32, "threads": 1}, {"measure gram": {"peak": 5e9, "answer": {"seconds": 18.0, "forward": 6.0, "bytes": 8e8}}, "merge fisher": {"peak": 1e9, "answer": {"seconds": 6.0, "forward": 1.0, "bytes": 0}}, "checkpoint_bytes": 6e8}),
        "train": ({"steps": 60, "batch_size": 64, "precision": "fp32", "threads": 1, "rounds": 1}, {"runs": {name: [trained] for name in list(CONTENDERS)[:4]}}),
        "feed": ({"cores": 2, "rounds": 3, "batch_size": 512, "takes": 0.15}, {"ratios": {key: [0.7, 0.8, 0.9] for key in ("decoded_to_memcpy", "encoded_to_decoder", "encoded_to_decode_only", "encoded_to_dataloader")}, "rounds": {key: [0.97, 0.98, 0.99] for key in ("decoded_per_s", "memcpy_per_s", "encoded_per_s", "decoder_per_s", "decode_only_per_s", "dataloader_per_s", "busy")}}),
        "pool": ({"samples": 1000, "shards": 10, "distinct": 2, "batch_size": 512, "steps": 6}, {"resume": {"same": True}, **{part: {"seconds": 2.0, "cpu": 1.0, "peak": 300 * MIB, "bytes": 57_000} for part in ("write_manifest", "plan", "index", "open", "batch")}}),
        "merge-folders": ({"bytes": 2_000_000_000, "threads": 2, "repeats": 1, "priority": 0}, {"methods": {"ties": {"ours": [run(3.0, 9.0)], "mergekit": [run(31.0, 39.0)]}}}),
        "evaluate-tiny": ({"model": "tiny", "checkpoints": 4, "images": 7000}, evaluated),
        "evaluate-vit-b-16": ({"model": "vit-b-16", "checkpoints": 1, "images": 16}, evaluated),
        "plan-tasks": ({"tasks": 1000, "trajectories": 2}, {"first": planned, "again": planned, "status": planned}),
        "plan-trajectories": ({"tasks": 3, "trajectories": 10000}, {"first": planned, "again": planned, "status": planned}),
        "tracker-down": ({"rounds": 3}, {"ratios": {"nobody": ratios, "silent": ratios}}),
        "orchestration-overhead": ({"runs": 1}, {"runs": [overhead], "sums": {"bare": 10.0, "run": 10.5, "steps": 10.2}}),
        "orchestration-scale": ({"experts": 1000}, {"steps": 4001, "window": 100, "cpu_ms": [1, 1.6, 1.7], "memory_mib": [200, 210, 240]}),
        "fomo-costs": ({"total_gflops": 1.8e9}, {"models": {"ViT-B-16": {"gflops_per_step": 63395.6, "weights_bytes": 6e8, "peak_bytes": 4e10}}, "plans": {"grid.yaml": {"disk_bytes": 8e11}}}),
    }  # fmt: skip


EXPECTED = {
    "merge-limit": "| `average` | 0.25 | 0.5 | 2.0 | 1.5 | 0.83 | 80 |",
    "merge-limit-8": "8 experts of 4 MiB",
    "sweep-report": "9.8 s of CPU for a page of 1.7 MB with 13 figures",
    "sweep-tracking": "6.0 ms of CPU per model, and in all 0.4 %",
    "keep": "| `none` | 60 | 80 | 102 | 2.0 % |",
    "small-disk": "refused with `keep: all` (exit code 2), finished with `keep: none`",
    "service-gates-tasks": "| expert of another task | 0 of 1 (0.00 to 0.98) | `solo.no_gain` 1 |",
    "service-gates": "| noise | 0 of 1 (0.00 to 0.98) | `solo.no_gain` 1 |",
    "merge-peers": "| `average` | 0.5 | 2.00 | 4.0 | took more than the 8192 MiB that it might | | 80, 80, - |",
    "folders": "| `ties` | 10 / 40 | 4.0 | 4 / 32 | 8.0 | 80 / 80 | 1.0 |",
    "memory": "| 8 experts | 80 |",
    "agreement": "| average, mergekit | 10 | 1 | 1e-07 | 1e-06 |",
    "start-up": "a TIES merge of two tiny checkpoints 0.2 s",
    "arrivals": "| `ties` | 10.0 | 1.00 | 1.010 | 1.010 | 1.000 |",
    "arrivals-statistics": "| `regmean` | 10.0 | 1.00 | 1.010 | 1.010 | 1.000 |",
    "regmean": "| ours / FusionBench, median of rounds | 0.50 | 1.00 | 1.00 |",
    "packed": "2 experts of 14.0 MB become 1.4 to 2.0 times smaller, 1.6 times together, in 2.0 s of CPU",
    "serving": "With swaps the rate was 0.90 times that without, p99 1.20 times, memory 1.00 times; no request of 200 failed",
    "adapters": "| continual fine-tuning | .25 / .50 / .35 | .25 / .50 / .35 |",
    "evidence": "| gram | 18 | 3.0 | 5,000 | 800 |",
    "overhead": "takes 1.05 times what a bare",
    "scale": "its memory grows by 30.0 MiB",
    "plan": "| 1,000 tasks, 2 strategies | 7,999 | 1.0 s, 900 MiB | 1.0 s, 900 MiB | 6 MB | 1.0 s, 900 MiB |",
    "tracker-down": "| training, CPU | 1.00 (0.90 to 1.10) | 1.00 (0.90 to 1.10) |",
    "train": "| bare loop | 1,280 | 1.00 | 3.00 | 1.00 |",
    "feed": "pictures every 0.15 s is busy 0.98 (0.97 to 0.99) of the time",
    "pool": "| index, once | 2.00 | 1.00 | 300 |",
    "evaluate": "| vit-b-16: 1 checkpoint(s), 16 images | ours | 5.00 | 4.0 | 0.80 | 1 |",
    "machine": "Other processes used 1.5 to 1.5 cores",
    "fomo-costs": "| ViT-B-16 | 63,396 | 1,420 | 0.60 GB | 40 GB |",
    "fomo-disk": "0.8 TB for `grid.yaml`",
}


def test_table_of_what_is_expected_names_every_block() -> None:
    assert EXPECTED.keys() == page.BLOCKS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_block_states_what_the_results_hold(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, (settings, found) in invented().items():
        whole = {
            "settings": settings,
            "found": found,
            "machine": MACHINE,
            "versions": VERSIONS,
            "date": "2026-01-01",
        }
        (tmp_path / f"{file}.json").write_text(json.dumps(whole))
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    said = [" ".join(line.split()) for line in page.BLOCKS[name]().splitlines()]
    assert any(EXPECTED[name] in line for line in [*said, " ".join(said)]), "\n".join(said)


def test_block_without_its_results_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESULTS", ROOT / "nowhere")
    text = "<!-- figures: train -->\nold\n<!-- end -->"
    assert "Not measured yet: `benchmarks/all.sh` makes `nowhere/train.json`." in page.written(text)
