"""Low-rank adapters in a network that is trained: a chosen matrix W reads as W + s * B A, of which B and A alone are trained.

LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3). The sum is made where a module reads its weight (torch's parametrizations). So packed
attention, whose projections no wrapper of a module reaches, is adapted like any linear layer, and what is trained is what merges read.
The price is one sum per matrix and step, and gradients as large as the matrices while a step lasts.

Invariant: before the first step the network is that of its weights, to the bit, because B is zero. What is kept of an expert are its
factors; its weights follow from them and from the weights that it started from.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.parametrize import register_parametrization

from merge_service.anatomy import modality
from merge_service.checkpoints import ADAPTER_FOLDER, WEIGHTS_FILE, on_grid, sha256_of, write_adapted
from merge_service.errors import UserError
from merge_service.merging import Factors, write_adapter
from workers.models.model import copy_beside
from workers.training.recipe import Adapter

ALL = "all-linear"
_LIST = ".parametrizations."
_UP, _DOWN = ".0.up", ".0.down"


class LowRank(torch.nn.Module):
    """W [out, in] -> W + scale * up [out, r] @ down [r, in], in float32 whatever the precision around it."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = torch.nn.Parameter(up), torch.nn.Parameter(down), scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The adapted weight."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def attach(model: torch.nn.Module, adapter: Adapter, trainable: str, seed: int, who: str) -> None:
    """Adapt the targets among the towers that are trained, in place. A is drawn as torch draws linear layers, from seed and name.

    Raises UserError for a target that is no linear layer or packed attention there; the message calls the model `who`.
    """
    found = {
        name: (module, key) for name, module, key in _adaptable(model) if trainable in ("all", modality(name))
    }
    for target in adapter.targets:
        if not any(_fits(name, target) for name in found):
            ends = dict.fromkeys(_module(name).rpartition(".")[2] for name in found)
            raise UserError(
                f"recipe.adapter.targets: {target!r} fits no linear layer or packed attention that recipe.trainable: {trainable} trains "
                f"in {who}; give {ALL}, or paths or ends of paths such as {', '.join([*ends][:6])}"
            )
    for name, (module, key) in found.items():
        if any(_fits(name, target) for target in adapter.targets):
            weight = module.get_parameter(key)
            up = torch.zeros(weight.shape[0], adapter.rank, device=weight.device)
            down = _drawn(name, (adapter.rank, weight.shape[1]), seed, weight.device)
            register_parametrization(module, key, LowRank(up, down, adapter.scale), unsafe=True)


def save(state: Mapping[str, torch.Tensor], adapter: Adapter, init: Path, out: Path) -> None:
    """Write an expert into the directory `out`: its adapter in a folder of its own, and the weights that this makes of those in `init`.

    `state` are the tensors of the adapted network. The scale is part of the factors, which are rounded so that their products are exact.
    """
    parts = []
    for key in state:
        if key.endswith(_UP) and _LIST in key:
            name = key.removesuffix(_UP).replace(_LIST, ".")
            up, down = (state[key.removesuffix(_UP) + end].cpu().numpy() for end in (_UP, _DOWN))
            shape = (up.shape[0], down.shape[1])
            left, right = (on_grid(one, adapter.rank) for one in (up * np.float32(adapter.scale), down))
            parts.append(Factors(name, shape, left, right))
    write_adapter(out / ADAPTER_FOLDER, f"sha256:{sha256_of(init / WEIGHTS_FILE)}", parts)
    copy_beside(init, out)
    write_adapted(init / WEIGHTS_FILE, out / ADAPTER_FOLDER, out / WEIGHTS_FILE)


def _adaptable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """(name of the weight, its module, its key there) of all linear layers and packed attentions; shared weights are left out."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for path, module in model.named_modules():
        for key in ("weight", "in_proj_weight"):
            weight = module._parameters.get(key)
            if weight is None or weight.dim() != 2 or uses[id(weight)] > 1:
                continue
            if key == "in_proj_weight" or isinstance(module, torch.nn.Linear):
                yield f"{path}.{key}" if path else key, module, key


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _fits(name: str, target: str) -> bool:
    return target == ALL or f".{_module(name)}".endswith(f".{target}")


def _drawn(name: str, shape: tuple[int, int], seed: int, device: torch.device) -> torch.Tensor:
    if device.type == "meta":
        return torch.empty(shape, device=device)
    bound = 1 / math.sqrt(shape[1])
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).uniform(-bound, bound, shape)
    return torch.from_numpy(values.astype(np.float32)).to(device)
