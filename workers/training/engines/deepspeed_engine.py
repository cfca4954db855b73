"""The same optimiser step as `TorchEngine`, with its state spread over ranks by DeepSpeed's ZeRO, stages 0 to 3.

Invariant: parameters stay fp32 and the recipe's precision is autocast, so the gathered parameters *are* the fp32 weights at
every stage and nothing has to be put together from pickled shards. DeepSpeed's own checkpoints are pickles: they are
written and read within one job's scratch only, after their sha256 was checked, and never become an artifact.
"""

import gc
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from workers.feed.device import device_of
from workers.jobs import EngineSpec
from workers.models.base import MAX_LOGIT_SCALE
from workers.models.model import set_trainable
from workers.training.engines.arithmetic import (
    LossScale,
    adamw,
    clamp_temperature,
    clip,
    learning_rate,
    seed_step,
    softmax_temperature,
)
from workers.training.engines.average import Average
from workers.training.engines.groups import average_over_ranks, join_alone
from workers.training.engines.protocol import Report
from workers.training.engines.snapshot import Snapshot
from workers.training.objective import ContrastiveLoss, TwoTowers
from workers.training.parts import in_parts
from workers.training.recipe import Recipe

TAG, AVERAGE = "engine", "average.safetensors"
BUCKET = 24_576_000  # elements per reduction bucket, a multiple of 1024; DeepSpeed's own default would set aside 2 GB


def _deepspeed(device: str) -> Any:
    """Import DeepSpeed for this device, on a CPU without its shared-memory collectives: those are compiled at first use,
    for about a minute, and gloo does the same."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=r"`?torch\.distributed\.", category=FutureWarning
    )  # once per collective
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine:
    """See `protocol.Engine`. Needs a process group (`groups.join_group`); a single rank makes one of its own."""

    def __init__(
        self, model: torch.nn.Module, recipe: Recipe, steps: int, spec: EngineSpec, seed: int, rank: int = 0
    ) -> None:
        self._deepspeed = _deepspeed(spec.device)
        if spec.world == 1:
            join_alone(spec.device)
        self._deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self._model, self._recipe, self._steps, self._seed = model, recipe, steps, seed
        self._rank, self._world, self._stage = rank, spec.world, spec.zero_stage
        trained = set(set_trainable(model, recipe.trainable))
        self._trained = {name: p for name, p in model.named_parameters() if name in trained}
        self._temperature = softmax_temperature(self._trained)
        self._scalars = _without_scalars(model)
        self._loss = ContrastiveLoss(rank, spec.world)
        device = device_of(spec.device)
        self._look = not device.overlaps
        self._scale = LossScale(recipe.precision == "fp16", device.place)
        self._snapshot = Snapshot(device)
        self._average = None if recipe.ema is None else Average(model, self._trained, recipe.ema)
        self._towers = TwoTowers(model, recipe.precision, world=spec.world)
        self._done = 0
        numel = sum(parameter.numel() for parameter in self._trained.values())
        self._linear = (
            torch.nn.functional.linear
        )  # stage 3 replaces it for the whole process, and leaves it so
        self._engine, *_ = self._deepspeed.initialize(
            model=self._towers,
            optimizer=adamw(list(self._trained.values()), recipe),
            config=_config(recipe, spec, min(-(-numel // 1024) * 1024, BUCKET)),
            dist_init_required=False,
        )
        if spec.world == 1 and self._stage == 0:  # a rank alone would pack, "reduce" and unpack all gradients
            self._engine.enable_backward_allreduce = False

    def step(self, images: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor | None = None) -> Report:
        seed_step(self._seed, self._done, self._rank)
        lr = learning_rate(self._done, self._steps, self._recipe)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss = self._take_gradients(images, tokens, places)
        norm = self._update_whole() if self._stage == 0 else self._update_sharded()
        self._done += 1
        reported = loss.detach().clone()
        if self._world > 1:
            average_over_ranks([reported], self._world)
        return Report(torch.stack([reported, norm]), lr)

    def _take_gradients(
        self, images: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor | None
    ) -> torch.Tensor:
        """This rank's share of the loss, once gradients are there."""
        if self._stage and self._scale.enabled:
            self._engine.optimizer.override_loss_scale(float(self._scale.numbers[0]))
        if self._recipe.accumulate == 1:
            loss = self._loss(self._engine(images, tokens, places))
            self._backward(0, loss)
            return loss
        parts, places = self._towers.parts(images, tokens, places, self._recipe.accumulate)
        seed = partial(seed_step, self._seed, self._done, self._rank)
        return in_parts(self._engine, self._loss, parts, places, seed, self._backward)

    def _backward(self, number: int, scalar: torch.Tensor) -> None:
        """Add the gradient of part `number`; DeepSpeed counts parts by calls of its `step`, the last of which changes weights."""
        scaled = scalar if self._stage else self._scale.times(scalar)
        self._engine.backward(scaled, scale_wrt_gas=False)
        if number + 1 < self._recipe.accumulate:
            self._engine.step()

    def _update_whole(self) -> torch.Tensor:
        """Stage 0: gradients are whole and averaged after `backward`, and treated exactly as `TorchEngine` does."""
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        self._scale.undo(gradients)
        norm = clip(list(self._trained.values()), self._recipe.clip, self._look)
        skipped = self._scale.update(norm)
        self._engine.optimizer.found_inf = skipped
        self._engine.step()
        clamp_temperature(self._temperature, skipped)
        if self._average is not None:
            self._average.update(skipped)
        return norm

    def _update_sharded(self) -> torch.Tensor:
        """Stages 1-3: DeepSpeed unscales, clips, and skips a step whose gradient norm is not finite. For that it waits for the norm."""
        optimizer = self._engine.optimizer
        self._engine.step()
        norm = float("inf") if optimizer.overflow else float(self._engine.get_global_grad_norm())
        if not optimizer.overflow:
            self._clamp_sharded()
            if self._average is not None:
                self._average.update(None)
        found = torch.full_like(self._scale.numbers[0], norm)
        self._scale.update(found)
        return found

    def _clamp_sharded(self) -> None:
        """Clamp the temperature in the working copy and in the optimiser's; every rank sees the same value and agrees."""
        parameter = self._temperature
        if parameter is None:
            return
        with _gathered([parameter], self._stage):
            value = parameter.detach().clone()
        if not bool(((value < 0) | (value > MAX_LOGIT_SCALE)).any()):
            return
        clamped = value.clamp(0, MAX_LOGIT_SCALE)
        self._deepspeed.utils.safe_set_full_fp32_param(parameter, clamped)
        with _gathered([parameter], self._stage, write=True), torch.no_grad():
            parameter.copy_(clamped)

    def weights(self) -> dict[str, torch.Tensor]:
        with _gathered(self._model.parameters(), self._stage):
            whole = self._model.state_dict() | (self._average.tensors if self._average else {})
            state = {name: t.detach().cpu().clone() for name, t in whole.items()}
        return {name: t.reshape(()) if name in self._scalars else t for name, t in state.items()}

    def save(self, directory: Path) -> Callable[[], None]:
        """DeepSpeed writes its own checkpoints, at once; nothing is left to do."""
        scale, good_steps = self._scale.numbers.tolist()
        numbers = {"done": self._done, "scale": scale, "good_steps": int(good_steps)}
        if self._rank == 0:
            (directory / "engine.json").write_text(json.dumps(numbers))
            if self._average is not None:
                averages = {f"average.{name}": tensor for name, tensor in self._average.tensors.items()}
                self._snapshot.take(averages, directory / AVERAGE)()
        self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
        return lambda: None

    def load(self, directory: Path) -> None:
        numbers = json.loads((directory / "engine.json").read_text())
        path, _ = self._engine.load_checkpoint(str(directory), tag=TAG)
        assert path is not None, directory
        self._done = numbers["done"]
        if self._average is not None:
            self._average.load(load_file(directory / AVERAGE))
        self._scale.numbers = torch.tensor([numbers["scale"], numbers["good_steps"]]).to(
            self._scale.numbers.device
        )

    def close(self) -> None:
        self._engine.destroy()
        if self._stage == 3:
            _forget_stage_3(self._engine.module, self._linear)
        self._trained.clear()
        del self._engine, self._model, self._towers, self._average
        gc.collect()  # an engine and its hooks refer to each other; the next expert may need the memory


def _config(recipe: Recipe, spec: EngineSpec, bucket: int) -> dict[str, Any]:
    return {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // spec.world // recipe.accumulate,
        "gradient_accumulation_steps": recipe.accumulate,
        "gradient_clipping": recipe.clip if spec.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": spec.zero_stage,
            "overlap_comm": spec.device == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": 2**31,
    }


def _without_scalars(model: torch.nn.Module) -> set[str]:
    """Give parameters without dimensions (`logit_scale`) one, in place, and return their names.

    DeepSpeed sends parameters as bytes and cannot view a scalar so; in every product with features both mean the same.
    """
    scalars = {name: p for name, p in model.named_parameters() if p.dim() == 0}
    for parameter in scalars.values():
        parameter.data = parameter.data.reshape(1)
    return set(scalars)


def _forget_stage_3(module: torch.nn.Module, linear: Any) -> None:
    """Undo what stage 3 leaves in the process: its own `linear` for everybody, and a list that keeps the model alive."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    torch.nn.functional.linear = linear
    FWD_MODULE_STACK[:] = [other for other in FWD_MODULE_STACK if other is not module]


@contextmanager
def _gathered(parameters: Iterable[torch.nn.Parameter], stage: int, write: bool = False) -> Iterator[None]:
    """Make parameters whole for a while; at stage 3 they are otherwise spread over the ranks."""
    if stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield
