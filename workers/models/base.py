"""Where a base model comes from, and its network, activation, preprocessing and weights.

One rule serves a file, a directory, a tag and a Hub repository. The network (with its activation) is that of the configuration
beside the weights, and must be the one that `model.config` names. The preprocessing comes from the first of these that states
one:

1. the configuration beside the weights (in their directory, beside their file, in their repository)
2. their tag
3. the configuration that `model.config` names
4. the known tags of the architecture, if all of them agree
5. open_clip's default, which is OpenAI's

Every key of `model.preprocess` in the study overrides all of these.

Invariant: finding a base reads configurations and no weights; torch is not imported, and open_clip only if tags are needed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from merge_service.checkpoints import CONFIG_FILE, Checkpoint
from merge_service.errors import UserError
from workers.models.configuration import (
    HUB,
    LOCAL,
    OPENAI,
    ModelError,
    architecture,
    checked,
    open_clip_models,
    read_configuration,
)

FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".json")
MAX_LOGIT_SCALE = math.log(100)
"""CLIP (Radford et al. 2021, 2.5): the temperature never scales logits by more than 100."""
ROUNDING = 0.01
"""The tolerance for rounding in half precision."""
STATED = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""The parts of the preprocessing that can be stated; the size is that of the image tower."""


@dataclass(frozen=True)
class Base:
    """A base before its weights are read.

    `configuration` is complete: {"model_cfg", "preprocess_cfg"}. `preprocess_from` names the source of the preprocessing; `notes`
    are for the user. `usual` is whether open_clip would use the same preprocessing for the same model. `pretrained` is a tag, a
    path or `hf-hub:REPO`; None means random weights. `home` is the directory of local weights.
    """

    config: str
    pretrained: str | None
    configuration: dict[str, Any]
    preprocess_from: str
    notes: tuple[str, ...] = ()
    usual: bool = True
    home: Path | None = None

    @property
    def model_cfg(self) -> dict[str, Any]:
        return self.configuration["model_cfg"]

    @property
    def preprocess(self) -> dict[str, Any]:
        return self.configuration["preprocess_cfg"]

    @property
    def tokenizer_home(self) -> Path | None:
        """The directory with this model's tokenizer; None unless `home` is a weights directory."""
        whole = self.home is not None and (self.home / CONFIG_FILE).is_file()
        return self.home if whole else None

    @property
    def activation(self) -> str:
        return "quick_gelu" if self.model_cfg.get("quick_gelu") else "gelu"


def find(config: str, pretrained: str | None = None, stated: Mapping[str, Any] | None = None) -> Base:
    """The base that `model.config`, `model.pretrained` and `model.preprocess` describe; weights are neither required nor read.

    `config` is an open_clip architecture, one of ours (`configs/models/NAME/`), a directory holding `open_clip_config.json`, a
    configuration file, `local-dir:DIR` or `hf-hub:REPO`. `pretrained` is an open_clip tag, a weights directory (with or without
    `local-dir:`), a `.safetensors` file, or `hf-hub:REPO`. With `pretrained` null, a `config` that names a directory or a
    repository includes its own weights, and an architecture name or a configuration file gives random weights. Raises UserError
    naming what is missing and the nearest names, and ModelError for configurations that do not agree.
    """
    if pretrained is None and (config.startswith((LOCAL, HUB)) or Path(config).is_dir()):
        pretrained = config
    home, beside = None, None
    if pretrained is not None and is_path(pretrained):
        home, beside = _on_disk(Path(pretrained.removeprefix(LOCAL)))
    found = named = configuration_of(config)
    says: list[tuple[str, Mapping[str, Any] | None]] = []
    if home is not None:
        if beside is not None:
            found = read_configuration(beside)
            says.append((str(beside), found.get("preprocess_cfg")))
    elif pretrained is not None and pretrained.startswith(HUB):
        found = _hub_configuration(pretrained)
        says.append((pretrained, found.get("preprocess_cfg")))
    elif pretrained is not None:
        says.append((f"the tag {pretrained} of {config}", _tag(config, pretrained, named["model_cfg"])))
    if found is not named:
        _must_agree(config, named, says[0][0], found)
    says.append((f"the configuration {config}", named.get("preprocess_cfg")))
    return _chosen(config, pretrained, found["model_cfg"], says, stated or {}, home)


def _chosen(
    config: str,
    pretrained: str | None,
    model_cfg: dict[str, Any],
    says: list[tuple[str, Mapping[str, Any] | None]],
    stated: Mapping[str, Any],
    home: Path | None,
) -> Base:
    source, spoken = next(((who, what) for who, what in says if what), ("", None))
    known = known_tags(config, model_cfg)
    agreed = _agreed(known)
    usual = spoken or {}
    if spoken is None:
        source = f"all known tags of {known[0][0]}" if agreed else "open_clip's default (OpenAI's)"
    preprocess = _whole(spoken or agreed or {}, model_cfg)
    over = {key: value for key, value in stated.items() if key in STATED and value is not None}
    before, preprocess = preprocess, {**preprocess, **over}
    if over:
        source = f"model.preprocess ({', '.join(over)}), the rest from {source}"
    base = Base(
        config, pretrained, {"model_cfg": model_cfg, "preprocess_cfg": preprocess}, source,
        usual=_equal(preprocess, _whole(usual, model_cfg)), home=home,
    )  # fmt: skip
    notes = tuple(_notes(base, known, spoken is None and not agreed and not over, before if over else None))
    return Base(**{**vars(base), "notes": notes})


def _whole(spoken: Mapping[str, Any], model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's preprocessing, complete; as in open_clip, `size` is that of the image tower."""
    said = {key: value for key, value in spoken.items() if key in OPENAI and value is not None}
    merged: dict[str, Any] = json.loads(json.dumps({**OPENAI, **said}))
    return {**merged, "size": model_cfg["vision_cfg"].get("image_size", merged["size"])}


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in STATED)


def known_tags(config: str, model_cfg: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(architecture, tag, open_clip's entry) of every tag with this network, by name or, for other names, by content."""
    names = [config] if config in open_clip_models() else _alike(model_cfg)
    return [(name, tag, entry) for name in names for tag, entry in tags_of(name).items()]


def tags_of(name: str) -> Mapping[str, Mapping[str, Any]]:
    """open_clip's entry of every tag of one of its architectures. Importing them takes seconds, so this is called only when
    needed.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    plain = name.replace("/", "-")  # OpenAI's own writing, which open_clip takes as well
    return {tag: get_pretrained_cfg(plain, tag) for tag in list_pretrained_tags_by_model(plain)}


def _alike(model_cfg: Mapping[str, Any]) -> list[str]:
    plain = _network(model_cfg)
    files = open_clip_models().items()
    return [name for name, file in files if _network(json.loads(file.read_text(encoding="utf-8"))) == plain]


def _network(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that identifies a network, without the place of its tokenizer."""
    text = {key: value for key, value in model_cfg["text_cfg"].items() if key != "hf_tokenizer_name"}
    return {**model_cfg, "text_cfg": text}


def _agreed(known: list[tuple[str, str, Mapping[str, Any]]]) -> Mapping[str, Any] | None:
    entries = [{key: entry[key] for key in STATED if key in entry} for _, _, entry in known]
    return entries[0] if entries and all(entry == entries[0] for entry in entries) else None


def _notes(
    base: Base, known: list[Any], unknown: bool, instead_of: Mapping[str, Any] | None
) -> Iterator[str]:
    """Notes for the user on the choice; none for random weights, which were trained with no preprocessing."""
    if base.pretrained is None:
        return
    shown = f"preprocessing {describe(base.preprocess)}, from {base.preprocess_from}"
    if unknown:
        why = "known tags of the architecture differ" if known else "the architecture has no known tags"
        yield f"{base.pretrained}: {shown}; nothing says what the weights were trained with ({why}): state model.preprocess"
    elif instead_of is not None and not _equal(base.preprocess, instead_of):
        yield f"{base.pretrained}: {shown}; otherwise it would be {describe(instead_of)}"
    matching = [one for one in known if _equal(base.preprocess, _whole(one[2], base.model_cfg))]
    if known and not matching and not unknown:
        name, tag, entry = known[0]
        yield (
            f"{base.pretrained}: {shown}; no known tag of {name} was trained so ({tag}: "
            f"{describe(_whole(entry, base.model_cfg))}): check model.preprocess"
        )
    activations = {bool(entry.get("quick_gelu")) for _, _, entry in known}
    said = (
        not is_path(base.pretrained) or base.tokenizer_home is not None
    )  # by a tag, or by the configuration beside the weights
    if known and not said and activations != {base.activation == "quick_gelu"}:
        others = [
            tag for _, tag, e in known if bool(e.get("quick_gelu")) != (base.activation == "quick_gelu")
        ]
        yield (
            f"{base.pretrained}: activation {base.activation}, as its configuration says; of the known tags of {known[0][0]} "
            f"{', '.join(others[:4])} were trained with the other one"
        )


def check_temperature(logit_scale: float, who: str) -> None:
    """Raise ModelError for a model that CLIP's softmax cannot train.

    A bias means that the loss is SigLIP's; a temperature above CLIP's limit without a bias fits neither loss.
    """
    if logit_scale > MAX_LOGIT_SCALE + ROUNDING:
        raise ModelError(
            f"{who}: its logit_scale is {logit_scale:.4g}, more than the ln 100 = {MAX_LOGIT_SCALE:.4g} that CLIP's softmax allows, "
            "and it has no logit_bias, which would make the loss SigLIP's sigmoid: it can be scored and merged, not trained. Give "
            "model_cfg.init_logit_bias and the weights' logit_bias, if the model has one"
        )


def temperature(weights: Path) -> float:
    """The `logit_scale` of a checkpoint; 0 if it has none."""
    with Checkpoint.open(weights) as checkpoint:
        names = [name for name in checkpoint.tensors if name.rpartition(".")[2] == "logit_scale"]
        return float(checkpoint.read(names[0]).reshape(-1)[0]) if len(names) == 1 else 0.0


def describe(preprocess: Mapping[str, Any]) -> str:
    """The preprocessing as one line."""
    mean, std = (", ".join(f"{float(value):.4g}" for value in preprocess[key]) for key in ("mean", "std"))
    return f"mean {mean}; std {std}; {preprocess['interpolation']}; {preprocess['resize_mode']}"


def is_path(pretrained: str) -> bool:
    """Whether weights are named by a path, not by a tag or a repository."""
    path = Path(pretrained)
    if pretrained.startswith(HUB):
        return False
    return pretrained.startswith(LOCAL) or "/" in pretrained or path.exists() or path.suffix in FILE_SUFFIXES


def _on_disk(path: Path) -> tuple[Path, Path | None]:
    """(the directory of the weights, the configuration beside them if there is one)."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a weights directory or a .safetensors file")
    if path.name.endswith(".safetensors.index.json"):
        raise UserError(f"{path} is the index of a checkpoint in shards; give the directory: {path.parent}")
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a .safetensors file; other formats may run code when opened: convert it first"
        )
    home = path if path.is_dir() else path.parent
    beside = home / CONFIG_FILE
    return home, beside if beside.is_file() else None


def configuration_of(config: str) -> dict[str, Any]:
    """{"model_cfg", "preprocess_cfg"} of a configuration by any of its names; the latter may be missing. Raises UserError."""
    return _hub_configuration(config) if config.startswith(HUB) else architecture(config)


def _tag(config: str, tag: str, model_cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """open_clip's entry of a tag. Raises UserError naming the nearest tags, or the architecture with the right activation."""
    tags = tags_of(config) if config.replace("/", "-") in open_clip_models() else {}
    if not tags:
        raise ModelError(
            f"model.pretrained: {config!r} has no pretrained tags, so pretrained: {tag!r} names nothing: give a weights "
            f"directory, a .safetensors file or {HUB}REPO; null means random weights"
        )
    if tag not in tags:
        near = get_close_matches(tag, tags, n=3, cutoff=0.4) or list(tags)
        raise ModelError(
            f"model.pretrained: {config} has no pretrained tag {tag!r}: did you mean {', '.join(near[:5])}?"
        )
    entry = tags[tag]
    trained, built = bool(entry.get("quick_gelu")), bool(model_cfg.get("quick_gelu"))
    if trained != built:
        other = f"{config}-quickgelu" if trained else config.removesuffix("-quickgelu")
        raise ModelError(
            f"model.pretrained: {config} with {tag}: QuickGELU mismatch, the weights were trained with "
            f"quick_gelu={trained}. Use {other}"
        )
    return entry


def _hub_configuration(name: str) -> dict[str, Any]:
    file = download(name.removeprefix(HUB), (CONFIG_FILE,), name)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}: {CONFIG_FILE} is not JSON: {error}") from error
    return checked(raw, f"{name}: {CONFIG_FILE}")


def download(repository: str, names: tuple[str, ...], what: str) -> Path:
    """The first of the files `names` that a repository has. Raises UserError."""
    from huggingface_hub import hf_hub_download

    reason = ""
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, library_name="open_clip"))
        except Exception as error:  # the Hub's library and those below it raise many kinds
            reason = reason or " ".join(str(error).split())[:300]
    if names == (CONFIG_FILE,):
        raise UserError(
            f"the configuration of {what} is not available ({CONFIG_FILE} of {repository}): {reason}"
        )
    raise UserError(
        f"the weights of {what} are not available: none of {', '.join(names)} of {repository} ({reason}). Pickled weights (.bin, .pt) "
        "are not read, since opening them can run code: convert them to safetensors and give the directory"
    )


def _must_agree(name: str, one: dict[str, Any], other_name: str, other: dict[str, Any]) -> None:
    """Raise ModelError unless two configurations describe the same network, activation included."""
    left, right = one["model_cfg"], other["model_cfg"]
    differing = [
        f"{part}.{key}" if part else key
        for part in ("", "vision_cfg", "text_cfg")
        for key in sorted(
            {*(left.get(part, {}) if part else left), *(right.get(part, {}) if part else right)}
        )
        if key not in ("vision_cfg", "text_cfg", "custom_text", "hf_tokenizer_name")
        if (left[part] if part else left).get(key, False) != (right[part] if part else right).get(key, False)
    ]
    if differing:
        raise ModelError(
            f"config: {name} and pretrained: {other_name} are different networks; they differ in "
            f"{', '.join(differing[:10])}. Give the configuration the weights were trained with"
        )
