"""Writes a base model, from anything that open_clip knows, as a weights directory.

Invariant: plain open_clip opens the directory as the same model, with its network, activation, preprocessing and tokenizer. Only
safetensors is opened.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint
from merge_service.errors import UserError
from workers.models.base import STATED, Base, download, find, tags_of
from workers.models.configuration import HUB, LOCAL
from workers.models.network import build, quiet, save_tokenizer
from workers.models.weights import load_strictly, tied, write_weights

SAFE_NAMES = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "model.safetensors")


def export_base(
    config: str,
    pretrained: str | None,
    out: Path,
    seed: int = 0,
    preprocess: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the weights directory `out` of the base that `find` finds; returns where its weights came from.

    Random weights are drawn with `seed`. Returns {"source", "random", "parameters", "tied", "preprocess", "preprocess_from",
    "activation", "objective", "notes"}. Raises what `find` raises, and UserError for weights that are missing or do not fit.
    """
    base = find(config, pretrained, preprocess)
    out.mkdir(parents=True, exist_ok=True)
    file = None if base.pretrained is None else _weights_file(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(base.configuration, out, base.config)
    configuration = {"model_cfg": base.model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    if file is not None and base.home is not None:
        load_strictly(model, file)
    elif file is not None:
        _load_foreign(model, file, base)
    write_configuration(configuration, out)
    save_tokenizer(base.model_cfg, base.tokenizer_home, out)
    ties = tied(model)
    write_weights(model.state_dict(), out / WEIGHTS_FILE, ties)
    return {
        "source": base.pretrained or f"random weights of {config}, seed {seed}",
        "random": base.pretrained is None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tied": ties,
        "preprocess": {key: base.preprocess[key] for key in (*STATED, "size")},
        "preprocess_from": base.preprocess_from,
        "activation": base.activation,
        "objective": "sigmoid" if getattr(model, "logit_bias", None) is not None else "softmax",
        "notes": list(base.notes),
    }


def write_configuration(configuration: Mapping[str, Any], out: Path) -> None:
    """Write `open_clip_config.json` of a weights directory."""
    text = json.dumps(configuration, indent=2, sort_keys=True) + "\n"
    (out / CONFIG_FILE).write_text(text, encoding="utf-8")


def _weights_file(base: Base) -> Path:
    """The safetensors file of a base's weights, downloaded if necessary."""
    pretrained = base.pretrained or ""
    if base.home is not None:
        path = Path(pretrained.removeprefix(LOCAL))
        with Checkpoint.open(path) as checkpoint:
            return checkpoint.path
    if pretrained.startswith(HUB):
        return download(pretrained.removeprefix(HUB), SAFE_NAMES, pretrained)
    repository, _, name = tags_of(base.config)[pretrained]["hf_hub"].rpartition("/")
    stem = name.rpartition(".")[0]
    names = (f"{stem}.safetensors", *SAFE_NAMES) if stem else SAFE_NAMES
    return download(repository, names, f"{base.config} {pretrained}")


def _load_foreign(model: torch.nn.Module, file: Path, base: Base) -> None:
    """Load published weights; open_clip converts names and shapes of several layouts. `file` is safetensors."""
    assert file.suffix == ".safetensors", file
    try:
        with quiet():
            open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except Exception as error:
        raise UserError(f"the weights of {base.config} {base.pretrained} cannot be read: {error}") from error
