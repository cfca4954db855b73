"""Merges of folders of a language model beside mergekit: the same recipe, the same folders, the two commands.

    python benchmarks/folders.py --mergekit MERGEKIT_YAML [--json FILE]

A base and two experts are made once below `--work`: a Llama of the widths of a 7B with fewer layers, in bfloat16, 2.1 GB each. The recipe
is mergekit's own YAML. Contenders alternate within each round, each run is a process of its own from its start to its end, imports
included, and all inputs are read into the page cache before it. Wall and CPU seconds and the peak of memory that no file backs are of the
whole process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
import report
from process import Run, clear, measure

CLI = Path(sys.executable).with_name("temporal-merge")
SIZES = {"7b-cut": (4096, 11008, 4, 32000), "tiny": (256, 688, 2, 2000)}
"""Width, inner width, layers and words."""
EACH = "parameters: {weight: 0.5"
RECIPES = {
    "linear": f"merge_method: linear\nmodels:\n- {{model: a, {EACH}}}}}\n- {{model: b, {EACH}}}}}\n",
    "ties": "merge_method: ties\nbase_model: base\nmodels:\n"
    f"- {{model: a, {EACH}, density: 0.2}}}}\n- {{model: b, {EACH}, density: 0.2}}}}\nparameters: {{normalize: true}}\n",
    "slerp": "merge_method: slerp\nbase_model: a\nmodels:\n- {model: a}\n- {model: b}\nparameters: {t: 0.5}\n",
    "dare_ties": "merge_method: dare_ties\nbase_model: base\nmodels:\n"
    f"- {{model: a, {EACH}, density: 0.2}}}}\n- {{model: b, {EACH}, density: 0.2}}}}\nparameters: {{normalize: true}}\n",
}
DTYPE = "dtype: bfloat16\n"


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama."""
    wide, inner, layers, words = SIZES[size]
    layer = {
        **{f"self_attn.{one}_proj": (wide, wide) for one in "qkvo"},
        "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide), "mlp.down_proj": (wide, inner),
        "input_layernorm": (wide,), "post_attention_layernorm": (wide,),
    }  # fmt: skip
    every = {
        f"model.layers.{at}.{part}.weight": shape for at in range(layers) for part, shape in layer.items()
    }
    return {
        "model.embed_tokens.weight": (words, wide), **every, "model.norm.weight": (wide,), "lm_head.weight": (words, wide)
    }  # fmt: skip


def make_models(room: Path, size: str) -> int:
    """The folders base, a and b in `room`, unless they are there; bytes of the weights of one."""
    from merge_service.checkpoints import CheckpointWriter

    wide, inner, layers, words = SIZES[size]
    layout = {name: ("BF16", shape) for name, shape in shapes(size).items()}
    for number, name in enumerate(("base", "a", "b")):
        place = room / name
        if (place / "config.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        with CheckpointWriter(place / "model.safetensors", layout, {"format": "pt"}) as writer:
            for at, (tensor, (_, shape)) in enumerate(layout.items()):
                start, own = (np.random.default_rng([seed, at]) for seed in (100, number))
                for first, count in _chunks(int(np.prod(shape))):
                    values = start.standard_normal(count, np.float32) * np.float32(0.02)
                    if number:
                        values += own.standard_normal(count, np.float32) * np.float32(1e-3)
                    writer.write(tensor, first, values)
        said = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": wide, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": wide // 128, "num_key_value_heads": wide // 128, "vocab_size": words,
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        }  # fmt: skip
        (place / "config.json").write_text(json.dumps(said))
    return (room / "base" / "model.safetensors").stat().st_size


def _chunks(count: int, most: int = 1 << 22) -> Iterator[tuple[int, int]]:
    for first in range(0, count, most):
        yield first, min(most, count - first)


def run(contender: str, name: str, room: Path, args: argparse.Namespace) -> Run:
    """One merge by one contender."""
    for model in ("base", "a", "b"):
        with (room / model / "model.safetensors").open("rb") as file:
            while file.read(1 << 24):
                pass
    recipe = RECIPES[name] + DTYPE
    for model in ("base", "a", "b"):  # a bare name would be looked for on a hub
        recipe = recipe.replace(f"model: {model}", f"model: {room / model}")
    (room / "recipe.yml").write_text(recipe)
    out = clear(room / "out") / "merged"
    command: list[Any] = (
        [CLI, "merge", room / "recipe.yml", "--out", out, "--threads", args.threads]
        if contender == "ours"
        else [
            args.mergekit,
            room / "recipe.yml",
            out,
            "--num-threads",
            args.threads,
            "--no-copy-tokenizer",
            "--quiet",
        ]
    )
    found = measure(command, args.threads, args.timeout, expect_json=False)
    written = sum(file.stat().st_size for file in out.glob("*.safetensors")) if out.exists() else 0
    if not found.failure and written < 0.99 * args.bytes:
        found.failure = f"wrote only {written} bytes"
    clear(room / "out")
    return found


def table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Medians, ours and mergekit's."""
    rows = []
    for name, runs in found.items():
        good = {who: [one for one in those if not one["failure"]] for who, those in runs.items()}
        cells = [
            f"{_median(good['ours'], key, unit)} / {_median(good['mergekit'], key, unit)}"
            for key, unit in (("wall", 1), ("cpu", 1), ("peak", 1 << 20))
        ]
        rows.append([f"`{name}`", *cells])
    return report.table(("method", "wall, s: ours / mergekit", "CPU, s", "peak, MiB"), rows)


def _median(runs: list[dict[str, Any]], key: str, unit: int) -> str:
    return f"{median(one[key] for one in runs) / unit:,.0f}" if runs else "failed"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mergekit",
        required=True,
        metavar="FILE",
        help="the command mergekit-yaml of an environment of its own",
    )
    parser.add_argument("--size", choices=SIZES, default="7b-cut")
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of every contender")
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench")
    record.add_json(parser)
    args = parser.parse_args()
    room = args.work.absolute() / f"folders-{args.size}"
    args.bytes = make_models(room, args.size)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {"ours": [], "mergekit": []} for name in args.methods.split(",")
    }
    warm = args.work.absolute() / "folders-tiny"
    make_models(warm, "tiny")
    for contender in ("ours", "mergekit"):  # what is compiled or written at first use is there afterwards
        run(contender, "ties", warm, argparse.Namespace(**{**vars(args), "bytes": 0}))
    for repeat in range(args.repeats):
        for name, runs in found.items():
            for contender in ("ours", "mergekit") if repeat % 2 == 0 else ("mergekit", "ours"):
                one = run(contender, name, room, args)
                print(f"{name} {repeat + 1}/{args.repeats} {contender}: {report.one(one)}", flush=True)
                runs[contender].append(one.as_json())
    print(table(found))
    python = Path(args.mergekit).with_name("python")
    versions = subprocess.run(
        [python, Path(__file__).with_name("peers_mergekit.py"), "--versions"],
        capture_output=True,
        text=True,
        check=True,
    )
    settings = {name: getattr(args, name) for name in ("size", "threads", "repeats", "bytes")} | {
        "priority": os.nice(0)
    }
    record.save(args.json, settings, {"methods": found}, mergekit=json.loads(versions.stdout))


if __name__ == "__main__":
    main()
