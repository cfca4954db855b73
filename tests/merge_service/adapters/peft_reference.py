"""What peft makes of a tiny model and an adapter, for every option: written once, by hand, into `tests/golden/peft.safetensors`.

    python -m tests.merge_service.adapters.peft_reference tests/golden/peft.safetensors    (peft 0.21.2, torch on the CPU)

The file holds `base/NAME`, `CASE/adapter/NAME` as peft saves it, `CASE/merged/NAME` where it differs from the base (peft's
`merge_and_unload`), and as metadata the `adapter_config.json` of each case.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

LINEAR = ["q", "k"]
CASES: dict[str, dict] = {
    "plain": {"r": 2, "lora_alpha": 5, "target_modules": LINEAR},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": LINEAR},
    "patterns": {
        "r": 2, "lora_alpha": 4, "target_modules": LINEAR, "use_rslora": True,
        "rank_pattern": {"layers.1.q": 3, "k": 1}, "alpha_pattern": {r"layers\.[01]\.k": 7, "^layers.0.q": 2},
    },
    "conv1d_of_gpt2": {"r": 2, "lora_alpha": 3, "fan_in_fan_out": True, "target_modules": ["c", "square"]},
    "dora": {"r": 2, "lora_alpha": 5, "use_dora": True, "target_modules": LINEAR},
    "dora_of_gpt2": {"r": 2, "lora_alpha": 3, "use_dora": True, "fan_in_fan_out": True, "target_modules": ["c", "square"]},
    "dora_of_embeddings": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["embed"]},
    "dora_of_convolutions": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["conv1", "conv2", "point"]},
    "modules_to_save": {"r": 2, "lora_alpha": 3, "target_modules": ["q"], "modules_to_save": ["head", "norm"]},
    "bias_all": {"r": 2, "lora_alpha": 3, "bias": "all", "target_modules": LINEAR},
    "lora_bias": {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": LINEAR},
    "embeddings": {"r": 2, "lora_alpha": 3, "target_modules": ["embed", "q"]},
    "tokens": {"r": 2, "lora_alpha": 3, "target_modules": ["q"], "trainable_token_indices": {"embed": [1, 4, 10]}},
    "convolutions": {"r": 2, "lora_alpha": 3, "target_modules": ["conv1", "conv2", "point"]},
    "attention": {"r": 2, "lora_alpha": 3, "target_modules": ["attn"]},
    "one_layer": {"r": 2, "lora_alpha": 3, "target_modules": LINEAR, "layers_to_transform": [1], "layers_pattern": "layers"},
    "converted_pissa": {"r": 2, "lora_alpha": 3, "target_modules": ["q"], "init_lora_weights": "pissa"},
}  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.q, self.k, self.norm = nn.Linear(6, 6), nn.Linear(6, 4), nn.LayerNorm(6)
        self.c, self.square, self.attn = Conv1D(9, 6), Conv1D(6, 6), nn.MultiheadAttention(6, 2)


class Tiny(nn.Module):
    """A module of every kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, 6), nn.ModuleList([Block(), Block()])
        self.conv1, self.conv2, self.point = nn.Conv1d(4, 5, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(6, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def _filled(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def _once(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with the update of an attention's out_proj once; peft 0.21.2 adds it twice (pull request 3774 of huggingface/peft)."""
    return {
        name: (value + base[name]) / 2 if "attn.out_proj" in name else value for name, value in merged.items()
    }


def main(out: str) -> None:
    from peft import LoraConfig, get_peft_model

    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, str] = {}
    for seed, (case, options) in enumerate(CASES.items(), 1):
        model = Tiny()
        _filled(model, 0)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        tensors |= {f"base/{name}": value for name, value in base.items()}
        adapted = get_peft_model(model, LoraConfig(**options))
        with tempfile.TemporaryDirectory() as room:
            initial = Path(room) / "initial"
            if case == "converted_pissa":
                adapted.peft_config["default"].init_lora_weights = True
                adapted.save_pretrained(initial)
                adapted.peft_config["default"].init_lora_weights = "pissa"
            _filled(adapted, seed)
            further = (
                {"path_initial_model_for_weight_conversion": str(initial)}
                if case == "converted_pissa"
                else {}
            )
            adapted.save_pretrained(room, **further)
            held = load_file(Path(room) / "adapter_model.safetensors")
            configs[case] = (Path(room) / "adapter_config.json").read_text()
        tensors |= {f"{case}/adapter/{name}": value for name, value in held.items()}
        merged = adapted.merge_and_unload().state_dict()
        if case == "attention":
            merged = _once(merged, base)
        assert merged.keys() == base.keys(), sorted(merged.keys() ^ base.keys())
        moved = {name: value for name, value in merged.items() if not torch.equal(value, base[name])}
        tensors |= {f"{case}/merged/{name}": value.clone().contiguous() for name, value in moved.items()}
        print(case, len(held), len(moved))
    save_file(tensors, out, metadata={"configs": json.dumps(configs)})


if __name__ == "__main__":
    main(sys.argv[1])
