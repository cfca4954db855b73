"""Every family of models: a merge of folders is a folder that its library opens, and computes what a merge in torch computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from merge_service.merge import merge
from tests.merge_service.families import FAMILIES

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
QUICK = ("Qwen2", "T5")
Tensors = dict[str, torch.Tensor]


def average(base: Tensors, experts: list[Tensors], name: str) -> torch.Tensor:
    return torch.stack([one[name] for one in experts]).mean(0)


def arithmetic(base: Tensors, experts: list[Tensors], name: str) -> torch.Tensor:
    return base[name] + 0.4 * sum(one[name] - base[name] for one in experts)


def largest(base: Tensors, experts: list[Tensors], name: str) -> torch.Tensor:
    deltas = torch.stack([one[name] - base[name] for one in experts])
    return base[name] + deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]


TECHNIQUES: dict[str, tuple[dict[str, Any], Callable[[Tensors, list[Tensors], str], torch.Tensor]]] = {
    "average": ({"logit_scale": "unclamped"}, average),
    "task_arithmetic": ({"scale": 0.4, "logit_scale": "unclamped"}, arithmetic),
    "magmax": ({"logit_scale": "unclamped"}, largest),
}


def opened(folder: Path) -> torch.nn.Module:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


def answers(model: torch.nn.Module, given: Tensors) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**given)
    named = [found.get(name) for name in ("logits", "logits_per_image", "last_hidden_state")]
    return [one for one in named if one is not None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    made: dict[str, list[Path]] = {}

    def of(family: str) -> list[Path]:
        if family not in made:
            room = tmp_path_factory.mktemp("family")
            FAMILIES[family](room / "base")
            made[family] = [room / "base"]
            for seed in (1, 2):
                torch.manual_seed(seed)
                model = opened(room / "base")
                for one in model.parameters():
                    one.data += 0.05 * one.data.std().nan_to_num(0.1) * torch.randn_like(one)
                model.save_pretrained(room / str(seed))
                made[family].append(room / str(seed))
        return made[family]

    return of


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in GIVEN]
)
def test_output_folder_opens_and_computes_what_a_merge_in_torch_does(
    family: str, technique: str, folders: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    base, *experts = folders(family)
    params, arithmetic_of = TECHNIQUES[technique]
    merge(technique, params, base, experts, tmp_path / "out")
    whole = opened(base)
    states = [
        {name: one.clone() for name, one in opened(path).state_dict().items()} for path in (base, *experts)
    ]
    whole.load_state_dict(
        {
            name: arithmetic_of(states[0], states[1:], name) if one.is_floating_point() else one
            for name, one in states[0].items()
        }
    )
    merged = opened(tmp_path / "out")
    for ours, theirs in zip(answers(merged, GIVEN[family]), answers(whole, GIVEN[family]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
