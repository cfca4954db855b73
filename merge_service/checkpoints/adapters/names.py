"""What the tensors of an adapter's file are, by their names: factors of a module, a bias, rows of tokens, or a full copy.

Two forms of names are read. PEFT's are paths of modules (`base_model.model.a.b.lora_A.weight`). Those of kohya's scripts join the
path by underscores and keep alpha as a tensor (`lora_unet_a_b.lora_down.weight`, `lora_unet_a_b.alpha`).

Invariant: every tensor of the file is used, or named in an error or a note.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merge_service.errors import AdapterCheckpoint, IncompatibleCheckpoint

_PEFT = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])(?:\.default)?\.(?P<what>weight|bias)"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.default)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|token_adapter\.(?P<tokens>trainable_tokens_delta)(?:\.default)?)"
)
_KOHYA = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<factor>down|up)\.weight|lora_(?P<peft>[AB])\.weight|(?P<alpha>alpha))"
)
_PREFIX = re.compile(
    r"lora_(?:unet|te\d?|transformer|prior|text_encoder)_|(?:diffusion_model|unet|transformer|text_encoder(?:_2)?)\."
)
_OTHER = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "ia3_": "IA3",
    "lora_mid": "a LoCon with a third factor",
    "dora_scale": "DoRA in kohya's form",
}
"""Parts of names that show other kinds of adapters."""


@dataclass
class Parts:
    """The tensors of one module by role: A, B, bias, magnitude, alpha, tokens; `embedding` if the factors are an embedding's."""

    roles: dict[str, str] = field(default_factory=dict)
    embedding: bool = False


@dataclass(frozen=True)
class Named:
    """The parts of each module, and full copies: tensors of the adapter by the base's name."""

    modules: Mapping[str, Parts]
    copies: Mapping[str, str]


def peft(names: Iterable[str], path: Path) -> Named:
    """The tensors of a PEFT adapter. Raises `AdapterCheckpoint` for a name that has no meaning here."""
    modules: dict[str, Parts] = {}
    copies: dict[str, str] = {}
    for name in names:
        other = next((kind for part, kind in _OTHER.items() if part in name), None)
        if other is not None:
            raise AdapterCheckpoint(f"{path}: {name} belongs to {other}, which is not computed here")
        rest = name.removeprefix(_PEFT)
        found = _PART.fullmatch(rest)
        if found is None:
            if "lora_" in rest or "original_module." in rest:
                raise AdapterCheckpoint(f"{path}: {name} is a part of an adapter that is not known here")
            copies[_bare(re.sub(r"\.modules_to_save(?:\.default)?\.", ".", rest))] = name
            continue
        parts = modules.setdefault(_bare(found["module"]), Parts())
        factor = found["factor"]
        if factor and found["what"] == "bias" and factor == "A":
            raise AdapterCheckpoint(f"{path}: {name} is a bias of the first factor, which is not known here")
        role = (
            ("bias" if found["what"] == "bias" else factor) if factor
            else found["embedding"] or ("magnitude" if found["magnitude"] else "tokens")
        )  # fmt: skip
        parts.embedding = parts.embedding or bool(found["embedding"])
        _set(parts, role, name, path)
    return Named(modules, copies)


def kohya(names: Iterable[str], weights: Collection[str], path: Path, notes: list[str]) -> Named:
    """The tensors of an adapter without configuration, by the modules of the base whose tensors are `weights`.

    Modules of other components (text encoders beside the network of a diffusion model) are left out with a note if all modules
    of their prefix are. Raises `AdapterCheckpoint` for other kinds, `IncompatibleCheckpoint` for modules that the base lacks.
    """
    joined: dict[str, list[str]] = {}
    for name in weights:
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            joined.setdefault(module.replace(".", "_"), []).append(module)
    modules: dict[str, Parts] = {}
    missing: dict[str, list[str]] = {}
    used: set[str] = set()
    for name in names:
        other = next((kind for part, kind in _OTHER.items() if part in name), None)
        found = _KOHYA.fullmatch(name)
        if other is not None or found is None:
            raise AdapterCheckpoint(
                f"{path}: {name} {f'belongs to {other}' if other else 'is no part of an adapter'}, which is not known here"
                + ("" if other else "; a PEFT adapter needs its adapter_config.json beside it")
            )
        prefix = found_prefix[0] if (found_prefix := _PREFIX.match(found["module"])) else ""
        held = joined.get(found["module"].removeprefix(prefix).replace(".", "_"), [])
        if len(held) > 1:
            raise IncompatibleCheckpoint(
                f"{path}: {found['module']} may be {held[0]} or {held[1]} of the base"
            )
        if not held:
            missing.setdefault(prefix, []).append(found["module"])
            continue
        used.add(prefix)
        role = (
            "alpha" if found["alpha"] else {"down": "A", "up": "B"}.get(found["factor"] or "", found["peft"])
        )
        _set(modules.setdefault(held[0], Parts()), role, name, path)
    for prefix, lacking in missing.items():
        if prefix in used or not used:
            raise IncompatibleCheckpoint(f"{path} adapts {lacking[0]}, which is no module of the base")
        notes.append(
            f"{path.name}: {len(set(lacking))} modules under {prefix!r} belong to another component and are left out here"
        )
    return Named(modules, {})


def prefix_between(modules: Collection[str], weights: Collection[str]) -> tuple[str, str] | None:
    """What to remove before the adapter's names, and what to put there, so that all are the base's; None if nothing does.

    A base is saved with or without the name of its head's wrapper (`model.`, `transformer.`), and an adapter with or without it.
    """
    known = {name.rpartition(".")[0] for name in weights} | set(weights)
    if not modules or all(module in known for module in modules):
        return ("", "")
    first = min(modules)
    for cut in (at + 1 for at, sign in enumerate(first) if sign == "."):
        prefix = first[:cut]
        if all(one.startswith(prefix) and one[cut:] in known for one in modules):
            return (prefix, "")
    added = {one.removesuffix(first) for one in known if one.endswith(f".{first}")}
    fitting = [one for one in sorted(added) if all(one + module in known for module in modules)]
    return ("", fitting[0]) if len(fitting) == 1 else None


def _bare(name: str) -> str:
    """A name without the wrapper of an adapted layer."""
    return re.sub(r"(^|\.)base_layer(?=\.|$)", "", name).removeprefix(".")


def _set(parts: Parts, role: str, name: str, path: Path) -> None:
    if role in parts.roles:
        raise AdapterCheckpoint(
            f"{path}: {name} and {parts.roles[role]} are both the part {role} of one module"
        )
    parts.roles[role] = name
