"""Writes the model that an adapter makes of its base as a file of its own, for readers that want whole weights.

Invariant: names, types, order and ties are the base's, and every number is the one that a merge of the adapter reads. Where the factors
are on a grid (`updates.on_grid`), the bytes depend on no library and no machine.
"""

from pathlib import Path

from merge_service.checkpoints.adapters.opening import open_adapter
from merge_service.checkpoints.adapters.references import Reference
from merge_service.checkpoints.ties import entry, recorded
from merge_service.checkpoints.writer import CheckpointWriter

SPAN = 1 << 22
"""Numbers that are made at a time."""
ADAPTER_FOLDER = "adapter"
"""The folder of an expert's adapter, beside the weights that it makes."""


def write_adapted(base: Path, adapter: Path, out: Path) -> None:
    """Write the file `out`: `base` with the `adapter`. Nothing is synced, as whoever keeps the file does that, or can make it again.
    Which base the adapter's configuration names does not count, and nothing is looked for by that name.

    Raises the `CheckpointError` that fits if they do not belong together.
    """
    with open_adapter(Reference(adapter, base)) as made:
        layout = {name: (info.dtype, info.shape) for name, info in made.tensors.items()}
        with CheckpointWriter(out, layout, entry(recorded(made)), durable=False) as writer:
            for name, info in made.tensors.items():
                for start in range(0, info.numel, SPAN):
                    stop = min(start + SPAN, info.numel)
                    writer.write_stored(name, start, made.raw(name, start, stop))
