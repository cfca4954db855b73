"""Models as weights directories: made from anything open_clip knows, opened, frozen in part, written again.

Invariant: a directory made here opens with plain `open_clip.create_model_and_transforms("local-dir:DIR")` and gives the
same model; nothing about it is filled in silently, neither weights nor activation nor preprocessing.
"""

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from merge_service.anatomy import modality
from merge_service.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from merge_service.errors import UserError
from workers.weights import (
    fill,
    load_strictly,
    open_weights,
    read_configuration,
    recorded_ties,
    tied,
    write_weights,
)

LOCAL, HUB = "local-dir:", "hf-hub:"
FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".json")


def set_trainable(model: torch.nn.Module, which: str) -> list[str]:
    """Freeze what is not in `which` ("all", "image" or "text") and return the names of the parameters that train.

    A frozen tower is put in evaluation mode as well, so that neither its parameters nor its running statistics move.
    `logit_scale` goes with the text tower (see `anatomy.modality`): an image-only expert keeps the temperature it started from.
    """
    assert which in ("all", "image", "text"), which
    model.train()
    for name, module in model.named_modules():
        if which != "all" and name and modality(name) != which:
            module.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(which in ("all", modality(name)))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def load(directory: Path, device: str = "cpu") -> torch.nn.Module:
    """The model of a weights directory, in evaluation mode; it is the caller's own.

    Raises UserError when the directory lacks a file, CorruptCheckpoint and IncompatibleCheckpoint when the weights are
    damaged or do not fit the configuration beside them.
    """
    read_configuration(directory / CONFIG_FILE)
    with open_weights(directory / WEIGHTS_FILE) as checkpoint:
        model = _unfilled(directory)
        fill(model, checkpoint)
    return model.to(device).eval()


def _unfilled(directory: Path) -> torch.nn.Module:
    """A model as the directory configures it, its weights not set yet.

    open_clip takes longer to draw random weights than a file takes to be read, and here they would be overwritten. So it
    is asked once per configuration, and copies are made of what it built; kept without weights, that takes no memory.
    """
    configuration = (directory / CONFIG_FILE).read_text(encoding="utf-8")
    if configuration not in _BUILT:
        if len(_BUILT) == _KEPT_CONFIGURATIONS:
            _BUILT.clear()
        _BUILT[configuration] = _without_values(_create(LOCAL + str(directory)), "meta")
    return _without_values(_BUILT[configuration], "cpu")


_KEPT_CONFIGURATIONS = 8
_BUILT: dict[str, torch.nn.Module] = {}


def _without_values(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """A copy of a model whose state is left unset on `device`; tied tensors stay tied, other buffers keep their values."""

    def unset(tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.empty_like(tensor, device=device, requires_grad=False)
        return torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty

    state = model.state_dict(keep_vars=True).values()
    return copy.deepcopy(model, {id(tensor): unset(tensor) for tensor in {id(t): t for t in state}.values()})


def save(model_or_state: torch.nn.Module | Mapping[str, torch.Tensor], like: Path, out: Path) -> None:
    """Write weights to the directory `out`, with the configuration and tokenizer files of the directory `like`."""
    state: Mapping[str, torch.Tensor]
    if isinstance(model_or_state, torch.nn.Module):
        state, ties = model_or_state.state_dict(), tied(model_or_state)
    else:
        state, ties = model_or_state, recorded_ties(like / WEIGHTS_FILE)
    write_weights(state, out / WEIGHTS_FILE, ties)
    for file in sorted(like.iterdir()):
        if file.is_file() and (file.name == CONFIG_FILE or "token" in file.name or "vocab" in file.name):
            shutil.copyfile(file, out / file.name)


def preprocess_cfg(directory: Path) -> dict[str, Any]:
    """open_clip's preprocessing of a weights directory, complete: size, mean, std, interpolation, resize_mode, ...

    As in open_clip, `size` is that of the image tower.
    """
    found = read_configuration(directory / CONFIG_FILE)
    merged = merge_preprocess_dict(PreprocessCfg(), found.get("preprocess_cfg") or {})
    return {**merged, "size": found["model_cfg"]["vision_cfg"].get("image_size", merged["size"])}


def tokenizer(directory: Path) -> "Remembering":
    """open_clip's tokenizer of a weights directory, as a function of texts to tokens, int64 [N, context].

    Building one takes a good part of a second, so it is kept per process and shared by all models that use the same,
    together with what it has been asked.
    """
    text_cfg = read_configuration(directory / CONFIG_FILE)["model_cfg"]["text_cfg"]
    name = text_cfg.get("hf_tokenizer_name")
    if name and any(directory.glob("*token*")):  # the files beside the weights, where there are any
        name = str(directory)
    wanted = (text_cfg.get(key) for key in ("context_length", "tokenizer_mode", "tokenizer_kwargs"))
    return _tokenizer(name, json.dumps([*wanted], sort_keys=True))


@lru_cache(maxsize=8)
def _tokenizer(hugging_face: str | None, settings: str) -> "Remembering":
    context_length, mode, more = json.loads(settings)
    length = context_length or DEFAULT_CONTEXT_LENGTH
    if hugging_face is None:
        return Remembering(open_clip.SimpleTokenizer(context_length=length, **(more or {})))
    return Remembering(HFTokenizer(hugging_face, context_length=length, tokenizer_mode=mode, **(more or {})))


class Remembering:
    """A tokenizer that is asked for every text once; class names and captions come back in every step and evaluation."""

    MOST = 200_000  # texts

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self._known: dict[str, torch.Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > self.MOST:
            self._known, new = {}, list(dict.fromkeys(texts))
        if new:
            self._known.update(zip(new, self.plain(new), strict=True))
        return torch.stack([self._known[text] for text in texts])


def _create(name: str) -> Any:
    with (
        quiet()
    ):  # open_clip warns that weights are random; here they are meant to be, or about to be overwritten
        return open_clip.create_model(name, load_weights=False, pretrained_text=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip's remarks off the root logger, and keep them from installing a handler on it."""
    root, silent = logging.getLogger(), logging.NullHandler()
    level = root.manager.disable
    root.addHandler(silent)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        root.removeHandler(silent)


# ------------------------------------------------------------------------------------------- the base model


def export_base(config: str, pretrained: str | None, out: Path, seed: int = 0) -> dict[str, Any]:
    """Write the weights directory `out` of a base model and say where its weights came from.

    `config` is an open_clip architecture, one of ours (`configs/models/NAME/`), a directory holding
    `open_clip_config.json`, such a file itself, `local-dir:DIR` or `hf-hub:REPO`. `pretrained` is an open_clip tag, a
    weights directory (with or without `local-dir:`), a `.safetensors` file, or `hf-hub:REPO`. With `pretrained` null, a
    `config` that names a directory or a hub repository brings its own weights, and an architecture name or a
    configuration file gives random weights drawn with `seed`.
    Returns {"source", "random", "parameters", "tied"}. Raises UserError naming what is missing and the nearest names.
    """
    out.mkdir(parents=True, exist_ok=True)
    if pretrained is None and (config.startswith((LOCAL, HUB)) or Path(config).is_dir()):
        pretrained = config
    if pretrained is not None and pretrained.startswith(HUB):
        model, found = _from_open_clip(pretrained, None)
        _must_agree(config, architecture(config), pretrained, found)
    elif pretrained is not None and _is_path(pretrained):
        model, found = _from_files(config, Path(pretrained.removeprefix(LOCAL)), out)
    elif pretrained is not None:
        _check_tag(config, pretrained)
        model, found = _from_open_clip(config, pretrained)
    else:
        model, found = _random(architecture(config), seed, out)
    (out / CONFIG_FILE).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _save_tokenizer(found, out)
    ties = tied(model)
    write_weights(model.state_dict(), out / WEIGHTS_FILE, ties)
    return {
        "source": pretrained or f"random weights of {config}, seed {seed}",
        "random": pretrained is None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tied": ties,
    }


def _is_path(pretrained: str) -> bool:
    path = Path(pretrained)
    return pretrained.startswith(LOCAL) or "/" in pretrained or path.exists() or path.suffix in FILE_SUFFIXES


def architecture(config: str) -> dict[str, Any]:
    """{"model_cfg", "preprocess_cfg"} of a configuration by any name `export_base` takes; the latter may be missing.

    Raises UserError naming the nearest known names.
    """
    if config.startswith(HUB):
        return {"model_cfg": _hub_config(config)}
    path = Path(config.removeprefix(LOCAL))
    if config.startswith(LOCAL) or path.is_dir():
        return read_configuration(path / CONFIG_FILE)
    if path.suffix == ".json":
        return read_configuration(path)
    ours = _our_models()
    if config in ours:
        return read_configuration(ours[config] / CONFIG_FILE)
    found = get_model_config(config)
    if found is None:
        names = [*ours, *open_clip.list_models()]
        near = get_close_matches(config, names, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(names[:8])}, ..."
        raise UserError(f"there is no model configuration named {config!r}: {hint}")
    return {"model_cfg": found}


def _our_models() -> dict[str, Path]:
    """Configurations in `configs/models/` below the working directory and below the source tree; the former win."""
    roots = (Path(__file__).parents[1], Path.cwd())
    found = [file.parent for root in roots for file in root.glob(f"configs/models/*/{CONFIG_FILE}")]
    return {directory.name: directory for directory in sorted(found)}


def _hub_config(name: str) -> dict[str, Any]:
    try:
        return get_model_config(name)
    except Exception as error:
        raise UserError(f"the configuration of {name} cannot be had: {error}") from error


def _check_tag(config: str, tag: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(config)
    if not tags:
        architecture(config)
        raise UserError(
            f"{config!r} has no pretrained tags, so pretrained: {tag!r} names nothing: give a weights directory, a "
            f".safetensors file or {HUB}REPO; null means random weights"
        )
    if tag not in tags:
        near = get_close_matches(tag, tags, n=3, cutoff=0.4) or tags
        raise UserError(f"{config} has no pretrained tag {tag!r}: did you mean {', '.join(near[:5])}?")


def _from_open_clip(name: str, tag: str | None) -> tuple[torch.nn.Module, dict[str, Any]]:
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message="QuickGELU mismatch"
        )  # another activation than it was trained with
        try:
            model = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
        except UserWarning as error:
            raise UserError(f"{name} with {tag}: {error} Use {name}-quickgelu") from error
        except Exception as error:
            raise UserError(f"the weights of {name} {tag or ''} cannot be had: {error}") from error
    return model, {"model_cfg": get_model_config(name), "preprocess_cfg": model.visual.preprocess_cfg}


def _from_files(config: str, path: Path, out: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a weights directory or a .safetensors file")
    found = architecture(config)
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            beside = read_configuration(path / CONFIG_FILE)
            _must_agree(config, found, str(path), beside)
            found = beside
        file = path / WEIGHTS_FILE
    elif path.suffix == ".safetensors":
        file = path
    else:
        raise UserError(
            f"{path} is not a .safetensors file; other formats may run code when opened: convert it first"
        )
    open_weights(file).close()
    model, found = _random(found, 0, out)
    load_strictly(model, file)
    return model, found


def _random(found: dict[str, Any], seed: int, out: Path) -> tuple[Any, dict[str, Any]]:
    (out / CONFIG_FILE).write_text(json.dumps(found), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _create(LOCAL + str(out.resolve()))
    return model, {"model_cfg": found["model_cfg"], "preprocess_cfg": model.visual.preprocess_cfg}


def _must_agree(name: str, one: dict[str, Any], other_name: str, other: dict[str, Any]) -> None:
    """Two configurations must describe the same network, activation and all."""
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
        raise UserError(
            f"config: {name} and pretrained: {other_name} are different networks; they differ in "
            f"{', '.join(differing[:10])}. Give the configuration the weights were trained with"
        )


def _save_tokenizer(found: dict[str, Any], out: Path) -> None:
    """Keep a Hugging Face tokenizer with the weights, since open_clip looks for it there and nowhere else."""
    if found["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        tokenizer(out).plain.tokenizer.save_pretrained(str(out))
