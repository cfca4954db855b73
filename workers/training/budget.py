"""The cost of a training step, measured without running one: floating-point operations and peak memory.

Budgets in GFLOPs need the cost before training. The model is built without storage and run on fake tensors, so a model of a billion
parameters can be measured on a laptop.
Invariant: a cost depends on architecture, batch size, trained tower and precision only, on any machine.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from merge_service.checkpoints import Checkpoint
from merge_service.errors import UserError
from workers.models.base import configuration_of
from workers.models.model import set_trainable
from workers.models.network import build
from workers.models.weights import admit
from workers.training.batch_norm import normalises_over_batch
from workers.training.low_rank import attach
from workers.training.objective import ContrastiveLoss, TwoTowers
from workers.training.preparation import prepare
from workers.training.recipe import Adapter, Recipe


@dataclass(frozen=True)
class Cost:
    """The cost of one optimisation step. `gflops_*` count forward and backward passes; a multiply-add is two operations.

    `peak_bytes` = parameters + buffers + gradients and two Adam moments of the trained parameters + the tensors that autograd keeps for
    the backward pass (each storage once). It is an estimate for comparisons, not the figure of an allocator.
    """

    batch_size: int
    gflops_per_sample: float
    gflops_per_step: float
    parameters: int
    trained_parameters: int
    weights_bytes: int
    activation_bytes: int
    peak_bytes: int


def measure(
    model: str | Path,
    batch_size: int,
    trainable: str = "all",
    precision: str = "fp32",
    adapter: Adapter | None = None,
) -> Cost:
    """The cost of a step of `batch_size` pairs, for a weights directory or any configuration that `export_base` accepts.

    Memory depends on `precision`, operations do not. Attention is counted as its fused kernel computes it: the backward pass
    recomputes the scores. ViT-B-16 at batch 512 takes 63,395.56 GFLOPs per step; FoMo-in-Flux states 63,394.76. The whole difference
    is that it transposes the logits where open_clip's loss multiplies again (6 instead of 3 products of 512 x 512 x 512; likewise
    for locked towers). Raises UserError for an unknown configuration, or one that cannot be run without its weights.
    """
    configuration = json.dumps(configuration_of(str(model)), sort_keys=True)
    return _measure(configuration, str(model), batch_size, trainable, precision, adapter)


def memory_ratio(
    model: str | Path, batch_size: int, trainable: str, precision: str, adapter: Adapter | None = None
) -> float:
    """Peak memory of training `trainable`, or an adapter there, divided by that of training both towers: the memory adjustment of a budget."""
    locked = measure(model, batch_size, trainable, precision, adapter)
    return locked.peak_bytes / measure(model, batch_size, "all", precision).peak_bytes


@lru_cache(maxsize=64)
def _measure(
    configuration: str, where: str, batch_size: int, trainable: str, precision: str, adapter: Adapter | None
) -> Cost:
    found = json.loads(configuration)
    try:
        model = _without_storage(found, where)
        if adapter is not None:
            attach(model, adapter, trainable, 0, where)
        with FakeTensorMode():
            _make_fake(model)
            trained = set(set_trainable(model, trainable))
            flops, activations = _one_step(model, batch_size, precision)
    except (RuntimeError, NotImplementedError, OSError, ImportError) as error:
        raise UserError(
            f"the cost of a step cannot be measured for this architecture ({error}); give budget.steps_per_task"
        ) from error
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    trained_bytes = sum(sizes[name] for name in trained)
    weights = sum(sizes.values())
    parameters = dict(model.named_parameters())
    return Cost(
        batch_size=batch_size,
        gflops_per_sample=flops / batch_size / 1e9,
        gflops_per_step=flops / 1e9,
        parameters=sum(p.numel() for p in parameters.values()),
        trained_parameters=sum(parameters[name].numel() for name in trained),
        weights_bytes=weights,
        activation_bytes=activations,
        peak_bytes=weights + 3 * trained_bytes + activations,
    )


def has_batch_norm(configuration: Mapping[str, object], where: str) -> bool:
    """Whether a network normalises over the batch, so that the features of a sample depend on the other samples."""
    return normalises_over_batch(_without_storage(configuration, where))


def check_recipe(
    configuration: Mapping[str, object], where: str, recipe: Recipe, checkpointing: bool
) -> None:
    """Raise UserError for a recipe that a network cannot be trained by."""
    prepare(_without_storage(configuration, where), recipe, checkpointing, where)


def check_fit(configuration: Mapping[str, object], where: str, weights: Path) -> None:
    """Raise IncompatibleCheckpoint if weights (a file or a directory) do not fit the network of a configuration."""
    with Checkpoint.open(weights) as checkpoint:
        admit(_without_storage(configuration, where), checkpoint)


def _without_storage(found: Mapping[str, object], where: str) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as directory, torch.device("meta"):
        model: torch.nn.Module = build(found, Path(directory), where, "meta")
    return model


def _make_fake(model: torch.nn.Module) -> None:
    """Replace every parameter and buffer by a fake CPU tensor; autocast applies to these, but not to meta tensors."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _one_step(model: Any, batch_size: int, precision: str) -> tuple[int, int]:
    """(operations forward and backward, bytes kept for the backward pass) of one fake step."""
    size = model.visual.image_size
    height, width = size if isinstance(size, Sequence) else (size, size)
    context = getattr(model, "context_length", None) or model.text.context_length
    images = torch.empty(batch_size, 3, height, width)
    tokens = torch.zeros(batch_size, context, dtype=torch.long)
    owned = {tensor.untyped_storage()._cdata for tensor in model.state_dict(keep_vars=True).values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False, depth=0, custom_mapping=_FUSED_ATTENTION)
    with counter, _no_fast_path():
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = ContrastiveLoss(0, 1)(TwoTowers(model, precision)(images, tokens))
        loss.backward()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Disable torch's attention fast path, which a frozen tower would take; the counter does not count its single operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_FUSED_ATTENTION = {  # torch's counter supports fused attention on the GPU, not on the CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
