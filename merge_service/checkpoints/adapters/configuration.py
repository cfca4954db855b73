"""The configuration of an adapter (adapter_config.json of PEFT), as far as its numbers depend on it.

What changes the numbers and is not computed here is refused by name: other kinds than LoRA, bases that the initialisation changed
(PiSSA, OLoRA, CorDA, ...), replicated layers, activated LoRA.

Invariant: a key that is not known here and not empty is an error, because it may change the numbers.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from merge_service.checkpoints.folders.kinds import read_json
from merge_service.errors import AdapterCheckpoint

T = TypeVar("T")

LONGEST = 300
"""Most characters of a pattern. A pattern is a regular expression of another's, matched against names of at most as many."""
_QUANTIFIED = re.compile(r"\)[*+{]|\\[1-9]")
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora", "lora_bias",
    "trainable_token_indices",
}  # fmt: skip
_REFUSED = {
    "layer_replication": "repeats layers of the base, so its names are not the base's",
    "alora_invocation_tokens": "is active for some tokens only (activated LoRA), so no single model equals it",
    "arrow_config": "routes between adapters for every token",
    "target_parameters": "adapts single parameters such as fused experts",
    "use_bdlora": "has block-diagonal factors",
    "kasa_config": "has singular values between its factors (KaSA)",
    "use_qalora": "pools its inputs by groups (QA-LoRA)",
    "megatron_config": "is split for Megatron",
}
_PLAIN_STARTS = (True, False, None, "true", "false", "gaussian", "orthogonal", "eva")
_MERGE_FIRST = "Let peft apply it (PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(OUT)), and give OUT"


@dataclass(frozen=True)
class AdapterConfig:
    """How the factors of each module are scaled. Patterns are in the order of the file; the first that fits counts."""

    rank: int
    alpha: float
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    transposed: bool = False
    dora: bool = False
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Which rows of an embedding are new, by the end of its module's name ("" for the only one)."""

    @classmethod
    def read(cls, path: Path) -> "AdapterConfig":
        """Raises `AdapterCheckpoint` naming the file, the key and what to do."""
        found = read_json(path)
        if found is None:
            raise AdapterCheckpoint(f"{path} is not a JSON object; correct it")
        _refuse(path, found)
        try:
            tokens = found.get("trainable_token_indices") or {}
            return cls(
                _number(found, "r", int),
                _number(found, "lora_alpha", float),
                bool(found.get("use_rslora")),
                {_pattern(key): int(value) for key, value in (found.get("rank_pattern") or {}).items()},
                {_pattern(key): float(value) for key, value in (found.get("alpha_pattern") or {}).items()},
                bool(found.get("fan_in_fan_out")),
                bool(found.get("use_dora")),
                {str(key): tuple(map(int, value)) for key, value in (tokens if isinstance(tokens, dict) else {"": tokens}).items()},
            )  # fmt: skip
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise AdapterCheckpoint(f"{path}: {error}") from None

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return _first(self.ranks, module, self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """s of s * B A for a module: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732, eq. 3)."""
        return _first(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _first(patterns: Mapping[str, T], module: str, default: T) -> T:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _refuse(path: Path, found: Mapping[str, object]) -> None:
    kind = found.get("peft_type")
    if kind != "LORA":
        raise AdapterCheckpoint(
            f"{path}: adapters of the kind {kind!r} are not computed here, only LORA (with DoRA and rsLoRA). {_MERGE_FIRST}"
        )
    for key, why in _REFUSED.items():
        if found.get(key):
            raise AdapterCheckpoint(f"{path}: the adapter {why} ({key}). {_MERGE_FIRST}")
    start = found.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise AdapterCheckpoint(
            f"{path}: init_lora_weights is {start!r}, which changes the base itself, so that B A is no difference from the plain base. "
            "Convert the adapter when it is saved (save_pretrained(..., path_initial_model_for_weight_conversion=START) in peft)"
        )
    unknown = [key for key, value in found.items() if value and key not in _HARMLESS | _READ]
    if unknown:
        raise AdapterCheckpoint(
            f"{path}: {unknown[0]} is {str(found[unknown[0]])[:60]!r}, a key that is not known here and may change the numbers. "
            f"{_MERGE_FIRST}"
        )


def _number(found: Mapping[str, object], key: str, kind: Callable[[float], T]) -> T:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}, not a number")
    if key == "r" and (value < 1 or value != int(value)):
        raise ValueError(f"r is {value!r}, not a whole number above 0")
    return kind(value)


def _pattern(key: object) -> str:
    """A pattern of names as it may be matched. Raises ValueError for one that could take forever."""
    text = str(key)
    if len(text) > LONGEST or _QUANTIFIED.search(text):
        raise ValueError(
            f"the pattern {text[:60]!r} is long, repeats a group or refers to one; write the names it means"
        )
    re.compile(text)
    return text
