"""Tiny Llama folders with vocabularies that differ, for recipes and for the reference.

`base` has 14 tokens and two rows of padding; `a` has learnt <a>; `b` has <b>, other ids, and lacks a token; `tied` has <a> and no head
of its own. Invariant: only numpy's PCG64 is used, whose stream is fixed.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.pipeline.recipes.tiny import CONFIG, WIDTH, tensors

WORDS = ["<unk>", "<s>", "</s>", *(f"w{at}" for at in range(11))]
HELD = {
    "base": WORDS,
    "a": [*WORDS, "<a>"],
    "b": ["<unk>", "<s>", "</s>", "<b>", *reversed(WORDS[3:13])],
    "tied": [*WORDS, "<a>"],
}
PADDING = {"base": 2}
ADDED = ("<unk>", "<s>", "</s>", "<a>", "<b>")
RECIPES = {
    "union": "merge_method: linear\nmodels: [{model: base}, {model: a}, {model: b}]\nparameters: {weight: 1}\nbase_model: base\ntokenizer_source: union\n",
    "union_task_vectors": "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 0.5}}, "
    "{model: b, parameters: {weight: 0.5}}]\ntokenizer_source: union\n",
    "base": "merge_method: linear\nmodels: [{model: base}, {model: a}, {model: b}]\nparameters: {weight: 1}\nbase_model: base\ntokenizer_source: base\n",
    "named": "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.3}\ntokenizer_source: b\n",
    "without_base": "merge_method: linear\nmodels: [{model: a}, {model: tall}]\nparameters: {weight: 1}\ntokenizer: {source: union}\n",
    "padded": "merge_method: linear\nmodels: [{model: base}, {model: a}, {model: b}]\nparameters: {weight: 1}\nbase_model: base\n"
    "tokenizer: {source: union, pad_to_multiple_of: 8}\n",
    "overridden": "merge_method: linear\nmodels: [{model: base}, {model: a}, {model: b}]\nparameters: {weight: 1}\nbase_model: base\n"
    "tokenizer:\n  source: union\n  tokens:\n    <a>: {source: {kind: zero}}\n    <b>: {source: {kind: model_token, model: a, token: w3}}\n"
    "    w5: {source: b, force: true}\n    w6: {source: {kind: model_token, model: base, token_id: 4}, force: true}\n",
}  # fmt: skip
"""mergekit's recipes over these folders. `tall` is `b` with a token that `a` lacks and one that both have."""


def write_worded(room: Path) -> None:
    """The folders of `HELD`, and `tall`."""
    held = {**HELD, "tall": [*HELD["b"], "<t>"]}
    shared = {
        name: np.random.default_rng(at).standard_normal(shape)
        for at, (name, shape) in enumerate(tensors(2).items())
    }
    words = {
        token: np.random.default_rng(900 + at).standard_normal((2, WIDTH))
        for at, token in enumerate([*WORDS, "<a>", "<b>", "<t>"])
    }
    for seed, (model, tokens) in enumerate(held.items()):
        rng = np.random.default_rng(70 + seed)
        own = {
            name: one + 0.05 * rng.standard_normal(one.shape)
            for name, one in shared.items()
            if "embed" not in name and "head" not in name
        }
        for at, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
            rows = [words[token][at] + 0.05 * rng.standard_normal(WIDTH) for token in tokens]
            own[name] = np.stack([*rows, *([np.zeros(WIDTH)] * PADDING.get(model, 0))])
        if model == "tied":
            del own["lm_head.weight"]
        (room / model).mkdir(parents=True)
        numbers = {name: one.astype(np.float32) for name, one in own.items()}
        save_file(numbers, room / model / "model.safetensors", {"format": "pt"})
        config = {
            **CONFIG,
            "num_hidden_layers": 2,
            "vocab_size": len(tokens) + PADDING.get(model, 0),
            "tie_word_embeddings": model == "tied",
        }
        (room / model / "config.json").write_text(json.dumps(config))
        _write_tokenizer(room / model, tokens)


def by_token(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder, those with a vocabulary axis cut into NAME|TOKEN, padding at NAME|ID."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    ids = {at: token for token, at in tree["model"]["vocab"].items()} | {
        one["id"]: one["content"] for one in tree["added_tokens"]
    }
    found = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if "embed" in name or "head" in name:
            found |= {f"{name}|{ids.get(at, at)}": row for at, row in enumerate(values)}
        else:
            found[name] = values
    return found


def _write_tokenizer(folder: Path, tokens: list[str]) -> None:
    how = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "added_tokens": [{"id": at, "content": token, **how} for at, token in enumerate(tokens) if token in ADDED],
        "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {token: at for at, token in enumerate(tokens)}, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
