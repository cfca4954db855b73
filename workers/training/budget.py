"""What a training step costs, without taking one: floating-point operations and peak memory.

The model is built without memory and run on fake tensors, so that a billion parameters are measured on a laptop.
Invariant: a cost depends on the architecture, batch size, trained tower and precision alone, on any machine.
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
from workers.training.objective import ContrastiveLoss, TwoTowers


@dataclass(frozen=True)
class Cost:
    """One optimisation step. `gflops_*` count forward and backward, one multiply-add as two operations.

    `peak_bytes` = parameters + buffers + gradients and two Adam moments of what trains + what autograd keeps for the
    backward pass (every storage once). It is an estimate for comparing, not the allocator's own figure.
    """

    batch_size: int
    gflops_per_sample: float
    gflops_per_step: float
    parameters: int
    trained_parameters: int
    weights_bytes: int
    activation_bytes: int
    peak_bytes: int


def measure(model: str | Path, batch_size: int, trainable: str = "all", precision: str = "fp32") -> Cost:
    """The cost of a step of `batch_size` pairs, for a weights directory or any configuration `export_base` takes.

    The operations do not depend on `precision`, the memory does. Attention counts as its fused kernel works: the backward
    pass recomputes the scores. For ViT-B-16 at batch 512 this gives 63,395.56 GFLOPs per step; FoMo-in-Flux states
    63,394.76 and takes the transpose of the logits where open_clip's loss multiplies again, which is the whole difference
    (6 instead of 3 products of 512 x 512 x 512; likewise for locked towers). Raises UserError for an unknown configuration, or one that cannot be run without its weights.
    """
    configuration = json.dumps(configuration_of(str(model)), sort_keys=True)
    return _measure(configuration, str(model), batch_size, trainable, precision)


def memory_ratio(model: str | Path, batch_size: int, trainable: str, precision: str) -> float:
    """Peak memory of training one tower over that of training both: the memory adjustment of a budget."""
    locked = measure(model, batch_size, trainable, precision)
    return locked.peak_bytes / measure(model, batch_size, "all", precision).peak_bytes


@lru_cache(maxsize=64)
def _measure(configuration: str, where: str, batch_size: int, trainable: str, precision: str) -> Cost:
    found = json.loads(configuration)
    try:
        model = _without_storage(found, where)
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


def has_batch_norm(configuration: Mapping[str, Any], where: str) -> bool:
    """Whether a network normalises over the batch, so that its training depends on what is in a batch together."""
    return normalises_over_batch(_without_storage(configuration, where))


def check_fit(configuration: Mapping[str, Any], where: str, weights: Path) -> None:
    """Raise IncompatibleCheckpoint for weights (a file or a directory) that are not those of the network."""
    with Checkpoint.open(weights) as checkpoint:
        admit(_without_storage(configuration, where), checkpoint)


def _without_storage(found: Mapping[str, Any], where: str) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as directory, torch.device("meta"):
        model: torch.nn.Module = build(found, Path(directory), where, "meta")
    return model


def _make_fake(model: torch.nn.Module) -> None:
    """Give every parameter and buffer a fake CPU tensor: unlike meta tensors they obey autocast."""
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
            loss = ContrastiveLoss(0, 1)(TwoTowers(model, precision, share_texts=False)(images, tokens))
        loss.backward()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """A frozen tower would take torch's attention fast path, a single operation that nobody counts."""
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


_FUSED_ATTENTION = {  # torch's counter knows the GPU's fused attention, not the CPU's
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
