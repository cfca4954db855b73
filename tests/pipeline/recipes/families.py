"""Families of models x techniques: a merge of folders beside the same merge in torch, by what both models compute.

`python -m tests.pipeline.recipes.families` (`make families`) runs all of them and writes the table of docs/recipes.md.

Invariant: the merge in torch reads the tensors that the folders hold and calls none of the engine.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from merge_service.merge import merge
from tests.merge_service import plain, plain_tensors
from tests.merge_service.families import FAMILIES
from tests.world import ROOT

IDS = torch.tensor([[5, 9, 3, 7]])
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
TEXT, BOTH = {"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS}
GIVEN: dict[str, dict[str, torch.Tensor]] = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi-3", "Mixtral", "Qwen3-MoE"), TEXT),
    **dict.fromkeys(("GPT-2", "GPT-NeoX", "Falcon", "BLOOM", "MPT"), TEXT),
    **dict.fromkeys(("BERT", "RoBERTa", "DistilBERT", "ModernBERT"), TEXT),
    **dict.fromkeys(("T5", "BART"), BOTH),
    "Whisper": {"input_features": torch.linspace(-1, 1, 4 * 16).reshape(1, 4, 16), "decoder_input_ids": IDS},
    **{key: {"pixel_values": PIXELS} for key in ("ViT", "DINOv2")},
    **{key: {"input_ids": IDS, "pixel_values": PIXELS} for key in ("CLIP", "SigLIP")},
}
Tensors = Mapping[str, torch.Tensor]
LIMIT = 1e-4
"""Largest difference of what both models compute, over the largest number that they compute."""


def average(name: str, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    return sum(experts) / len(experts)


def arithmetic(name: str, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    return base + 0.4 * sum(one - base for one in experts)


def largest(name: str, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    deltas = torch.stack([one - base for one in experts])
    return base + deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]


def ties(name: str, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    kept = []
    for delta in (one - base for one in experts):
        drop = delta.numel() // 2
        least = delta.abs().flatten().sort().values[drop - 1] if drop else 0
        kept.append(torch.where(delta.abs() >= least, delta, 0.0))
    return base + _elected(kept)


def dare_ties(name: str, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    kept = []
    for who, delta in zip(("one", "two"), (one - base for one in experts)):
        drawn = plain._dropped(delta.numpy(), 0.5, 0, who, name)
        kept.append(torch.from_numpy(np.asarray(drawn, np.float32)).reshape(delta.shape))
    return base + _elected(kept)


def slerp(name: str, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    first, second = (one.double() for one in experts)
    norms = [float(one.norm()) for one in (first, second)]
    cosine = float((first * second).sum()) / (norms[0] * norms[1]) if min(norms) > 1e-8 else 1.0
    if first.numel() == 1 or abs(cosine) > 0.9995:
        return ((first + second) / 2).float()
    angle = np.arccos(cosine)
    return (np.sin(angle / 2) / np.sin(angle) * (first + second)).float()


def model_stock(name: str, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    one, two = ((expert - base).double() for expert in experts)
    sizes = float(one.norm()) * float(two.norm())
    cosine = float((one * two).sum()) / sizes if sizes else 0.0
    ratio = 2 * cosine / (1 + cosine) if cosine > 0 else 0.0
    return base + (ratio * (one + two) / 2).float()


def iso_c(name: str, base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    deltas = [(one - base).double() for one in experts]
    if base.dim() != 2:
        return base + (sum(deltas) / 2).float()
    made = plain_tensors._iso([delta.numpy() for delta in deltas])
    return base + torch.from_numpy(made).float()


def _elected(kept: list[torch.Tensor]) -> torch.Tensor:
    signs = torch.stack(kept).sum(0).sign()
    agree = torch.stack([torch.where(one.sign() == signs, one, 0.0) for one in kept])
    return agree.sum(0) / (agree != 0).sum(0).clamp(min=1)


OF_TENSOR = {"granularity": "tensor", "density": 0.5}
Rule = Callable[[str, torch.Tensor, list[torch.Tensor]], torch.Tensor]
TECHNIQUES: dict[str, tuple[dict[str, Any], Rule]] = {
    "average": ({}, average),
    "task_arithmetic": ({"scale": 0.4}, arithmetic),
    "magmax": ({}, largest),
    "ties": (OF_TENSOR, ties),
    "dare_ties": (OF_TENSOR, dare_ties),
    "slerp": ({}, slerp),
    "model_stock": ({}, model_stock),
    "iso_c": ({"attention": "whole"}, iso_c),
}


def opened(folder: Path) -> torch.nn.Module:
    """The model in a folder, by its own class; every tensor of the file must have a place in it, and the reverse."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


def answers(model: torch.nn.Module, given: Tensors) -> list[torch.Tensor]:
    """What a model computes of its inputs."""
    with torch.no_grad():
        found = model(**given)
    named = [found.get(name) for name in ("logits", "logits_per_image", "last_hidden_state")]
    return [one for one in named if one is not None]


def made(family: str, room: Path) -> list[Path]:
    """The folders of a base and two experts."""
    FAMILIES[family](room / "base")
    paths = [room / "base"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = opened(room / "base")
        for one in model.parameters():
            one.data += 0.05 * one.data.std().nan_to_num(0.1) * torch.randn_like(one)
        model.save_pretrained(room / str(seed))
        paths.append(room / str(seed))
    return paths


def in_torch(technique: str, paths: list[Path], out: Path) -> Path:
    """The folder of a merge in torch."""
    base, *experts = (load_file(path / "model.safetensors") for path in paths)
    rule = TECHNIQUES[technique][1]
    merged = {
        name: rule(name, value, [one[name] for one in experts]) if value.is_floating_point() else value
        for name, value in base.items()
    }
    assert any(not torch.equal(merged[name], value) for name, value in base.items()), technique
    shutil.copytree(paths[0], out)
    tensors = {name: value.contiguous() for name, value in merged.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def apart(family: str, technique: str, paths: list[Path], room: Path) -> float:
    """The largest difference of what the two merges compute, over the largest number that they compute."""
    params = {**TECHNIQUES[technique][0], "logit_scale": "unclamped"}
    if technique == "slerp":
        params["weight"] = 0.5
    merge(technique, params, paths[0], paths[1:], room / "ours", ids=["one", "two"])
    ours, theirs = opened(room / "ours"), opened(in_torch(technique, paths, room / "theirs"))
    pairs = list(zip(answers(ours, GIVEN[family]), answers(theirs, GIVEN[family]), strict=True))
    assert pairs and all(torch.isfinite(one).all() for pair in pairs for one in pair)
    return max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)


MARKS = ("<!-- families: begin -->", "<!-- families: end -->")
PAGE = ROOT / "docs" / "recipes.md"


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the page: relative differences, by family and technique."""
    lines = [
        f"| family | {' | '.join(f'`{name}`' for name in TECHNIQUES)} |",
        "|---" * (len(TECHNIQUES) + 1) + "|",
    ]
    for family, row in found.items():
        lines.append(f"| {family} | {' | '.join(_shown(row[name]) for name in TECHNIQUES)} |")
    return "\n".join(lines)


def _shown(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-")


def main() -> int:
    """Run every cell, write the table, and say which cells are above the limit."""
    found: dict[str, dict[str, float]] = {}
    for family in GIVEN:
        with tempfile.TemporaryDirectory(prefix="families-") as name:
            paths = made(family, Path(name))
            found[family] = {}
            for technique in TECHNIQUES:
                room = Path(name) / technique
                room.mkdir()
                found[family][technique] = apart(family, technique, paths, room)
        print(family, {key: _shown(one) for key, one in found[family].items()}, flush=True)
    text = PAGE.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{after}")
    wrong = [f"{f} {t}: {e:.1e}" for f, row in found.items() for t, e in row.items() if not e < LIMIT]
    print("\n".join(wrong) or f"all {len(found)} x {len(TECHNIQUES)} below {LIMIT}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
