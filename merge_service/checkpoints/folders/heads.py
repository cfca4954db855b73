"""The output layer of a language model, which many models tie to the embedding: its usual names, and what a configuration says of it.

A library leaves a tied output layer out of the file. Whether a file without one is of a tied model, only the configuration beside it
says, and what the layer would be called, only the class of the model.

Invariant: names and the configuration decide; no number is read.
"""

import re

from merge_service.checkpoints.folders.kinds import CONFIG, read_json
from merge_service.checkpoints.weights import Weights

OUTPUT = re.compile(r"(?:^|\.)(?:lm_head|embed_out|proj_out|output|decoder|vocab_projector)\.weight$")
_SOURCE = (
    re.compile(r"(?:^|\.)shared\."),
    re.compile(r"(?:^|[._])(?:wte|embed(?!_out)\w*|word_embeddings)\b"),
)
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_HEADS = {"gpt_neox": "embed_out.weight", "whisper": "proj_out.weight"}
"""Output layers that are not called `lm_head`, by the type of the model."""


def is_source(name: str) -> bool:
    """Whether this is a usual name of an embedding that output layers share their weights with."""
    return any(pattern.search(name) for pattern in _SOURCE)


def source_rank(name: str) -> list[bool]:
    """The order in which names are those that files keep: a shared table, another embedding, anything else."""
    return [not pattern.search(name) for pattern in _SOURCE]


def shared_source(weights: Weights) -> str | None:
    """The embedding that is the output layer too, of a model whose file leaves the layer out and whose configuration ties the two."""
    config = _configuration(weights)
    if config.get("tie_word_embeddings") is not True or any(OUTPUT.search(name) for name in weights.tensors):
        return None
    words = {part.get("vocab_size") for part in (config, config.get("text_config") or {})} - {None}
    found = [
        name
        for name, info in weights.tensors.items()
        if is_source(name) and len(info.shape) == 2 and (not words or info.shape[0] in words)
    ]
    return found[0] if len(found) == 1 else None


def head_of(weights: Weights) -> str | None:
    """The name of the output layer by the class of the model; None if the class is not known to have one."""
    config = _configuration(weights)
    classes = config.get("architectures") or []
    if not any(str(one).endswith(_WITH_HEAD) for one in classes):
        return None
    return _HEADS.get(str(config.get("model_type")), "lm_head.weight")


def _configuration(weights: Weights) -> dict:
    """The configuration beside the weights; of an adapter, beside its base."""
    return (read_json(weights.files[0].parent / CONFIG) or {}) if weights.files else {}
