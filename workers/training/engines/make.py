"""Which engine trains an expert: the one that its job asks for. Importing this does not import DeepSpeed, which takes seconds."""

import torch

from workers.jobs import EngineSpec
from workers.training.engines.protocol import Engine
from workers.training.engines.torch_engine import TorchEngine
from workers.training.recipe import Recipe


def make_engine(
    model: torch.nn.Module, recipe: Recipe, steps: int, spec: EngineSpec, seed: int, rank: int = 0
) -> Engine:
    """The engine `spec` asks for, around a freshly loaded fp32 model, which it takes over."""
    if spec.kind == "deepspeed":
        from workers.training.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, recipe, steps, spec, seed, rank)
    return TorchEngine(model, recipe, steps, spec, seed, rank)
