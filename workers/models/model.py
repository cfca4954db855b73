"""Models as weights directories: written from anything that open_clip knows, opened, partly frozen, saved again.

Invariant: a directory written here opens with plain `open_clip.create_model_and_transforms("local-dir:DIR")` and gives the same
model; neither weights nor activation nor preprocessing are filled in silently.
"""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from merge_service.anatomy import modality
from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from workers.models.configuration import is_tokenizer_file, read_configuration
from workers.models.export import export_base
from workers.models.network import create, tokenizer
from workers.models.weights import fill, open_weights, recorded_ties, tied, write_weights

__all__ = ["copy_beside", "export_base", "load", "preprocess_cfg", "save", "set_trainable", "tokenizer"]


def set_trainable(model: torch.nn.Module, which: str) -> list[str]:
    """Freeze all parameters except those of `which` ("all", "image" or "text"); returns the names of the trainable ones.

    A frozen tower is put in evaluation mode as well, so that neither its parameters nor its running statistics change.
    `logit_scale` belongs to the text tower (see `anatomy.modality`): an image-only expert keeps its initial temperature. Of a model with
    adapters (`training.low_rank`) these alone are trainable, and no running statistics change.
    """
    assert which in ("all", "image", "text"), which
    model.train()
    for name, module in model.named_modules():
        if which != "all" and name and modality(name) != which:
            module.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(which in ("all", modality(name)))
    if any(map(is_parametrized, model.modules())):
        _freeze_all_but_adapters(model)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _freeze_all_but_adapters(model: torch.nn.Module) -> None:
    adapters = {
        id(p)
        for m in model.modules()
        if isinstance(m, ParametrizationList)
        for one in m
        for p in one.parameters()
    }
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in adapters)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def load(directory: Path, device: str | torch.device = "cpu", weights: Path | None = None) -> torch.nn.Module:
    """The model of a weights directory, in evaluation mode; the caller owns it. `weights` is a file to take in place of its own.

    Raises UserError when the directory lacks a file, CorruptCheckpoint and IncompatibleCheckpoint when the weights are damaged or
    do not fit the configuration beside them.
    """
    read_configuration(directory / CONFIG_FILE)
    with open_weights(weights or directory / WEIGHTS_FILE) as checkpoint:
        model = _unfilled(directory)
        fill(model, checkpoint)
    return model.to(device).eval()


def _unfilled(directory: Path) -> torch.nn.Module:
    """A model with the configuration of the directory, without weights.

    Drawing random weights in open_clip takes longer than reading a file, and the weights would be overwritten. So each
    configuration is built once and copied; the cached model has no values and takes no memory.
    """
    configuration = (directory / CONFIG_FILE).read_text(encoding="utf-8")
    if configuration not in _BUILT:
        if len(_BUILT) == _KEPT_CONFIGURATIONS:
            _BUILT.clear()
        _BUILT[configuration] = _without_values(create(directory, str(directory / CONFIG_FILE)), "meta")
    return _without_values(_BUILT[configuration], "cpu")


_KEPT_CONFIGURATIONS = 8
_BUILT: dict[str, torch.nn.Module] = {}


def _without_values(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """A copy of a model with an uninitialised state on `device`; tied tensors stay tied, other buffers keep their values."""

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
    copy_beside(like, out)


def copy_beside(like: Path, out: Path) -> None:
    """Copy what goes with the weights in the directory `like`: configuration and tokenizer files."""
    for file in sorted(like.iterdir()):
        if file.name == CONFIG_FILE or is_tokenizer_file(file):
            shutil.copyfile(file, out / file.name)


def preprocess_cfg(directory: Path) -> dict[str, Any]:
    """open_clip's preprocessing of a weights directory, complete: size, mean, std, interpolation, resize_mode, ...

    As in open_clip, `size` is that of the image tower.
    """
    found = read_configuration(directory / CONFIG_FILE)
    merged = merge_preprocess_dict(PreprocessCfg(), found.get("preprocess_cfg") or {})
    return {**merged, "size": found["model_cfg"]["vision_cfg"].get("image_size", merged["size"])}
