"""One optimiser step at a time, by torch alone or by DeepSpeed, behind one protocol."""

from merge_service.moved import names_from

__getattr__ = names_from(
    "workers.training.engines.make",
    "workers.training.engines.groups",
    "workers.training.engines.protocol",
    "workers.training.engines.torch_engine",
)
