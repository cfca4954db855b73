"""Tiny Llama folders whose numbers are the same with any version of any library, for recipes and for the reference.

Invariant: only numpy's PCG64 is used, whose stream is fixed.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER, WORDS = 4, 6, 16
DEPTHS = {"base": 4, "a": 4, "b": 4, "c": 4, "deep": 6}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2, "vocab_size": WORDS, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tensors(depth: int) -> dict[str, tuple[int, ...]]:
    square, wide, tall = (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    layer = {
        **{f"self_attn.{one}_proj": square for one in "qkvo"},
        "mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": tall, "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
    }  # fmt: skip
    found = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    found |= {
        f"model.layers.{at}.{part}.weight": shape for at in range(depth) for part, shape in layer.items()
    }
    return {**found, "model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}


def write_models(room: Path) -> None:
    """The folders of `DEPTHS` in `room`: a base, three experts near it, and a deeper model near its first layers."""
    shapes = tensors(max(DEPTHS.values()))
    start = {
        name: np.random.default_rng(at).standard_normal(shape)
        for at, (name, shape) in enumerate(shapes.items())
    }
    shared = {
        name: np.random.default_rng(500 + at).standard_normal(shape)
        for at, (name, shape) in enumerate(shapes.items())
    }
    for seed, (model, depth) in enumerate(DEPTHS.items()):
        own = {
            name: start[name] + (model != "base") * (0.05 * shared[name] + 0.1 * _noise(seed, at, shape))
            for at, (name, shape) in enumerate(shapes.items())
            if name in tensors(depth)
        }
        (room / model).mkdir(parents=True)
        save_file(
            {name: one.astype(np.float32) for name, one in own.items()},
            room / model / "model.safetensors",
            {"format": "pt"},
        )
        (room / model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": depth}))


def _noise(seed: int, at: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1000 * (seed + 1) + at).standard_normal(shape)
