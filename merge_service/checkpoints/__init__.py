"""Tensors on disk: what a file holds, whether it may take part in a merge, and where the result is written.

A checkpoint is a safetensors file, shards with an index, or a directory with either. It is read through memory maps and written
block by block. A merge reads `Weights`; a checkpoint is one implementation of that protocol. Every fault of an input is an error
with its reason; nothing is skipped or padded to fit.
"""

from merge_service.checkpoints.adapters.opening import adapter_files, open_weights
from merge_service.checkpoints.adapters.references import absolute, parts_of
from merge_service.checkpoints.adapters.updates import on_grid
from merge_service.checkpoints.adapters.whole import ADAPTER_FOLDER, write_adapted
from merge_service.checkpoints.admission import admit, check_finite, spare_prefix
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, locate, sha256_of
from merge_service.checkpoints.dtypes import DTYPES
from merge_service.checkpoints.folders.kinds import ADAPTER_FILES
from merge_service.checkpoints.header import HEADER_LIMIT
from merge_service.checkpoints.packed import pack, unpack
from merge_service.checkpoints.pickled.convert import Converted, convert
from merge_service.checkpoints.shards import bytes_of
from merge_service.checkpoints.target import overwrites
from merge_service.checkpoints.ties import Ties, entry, of_groups, recorded
from merge_service.checkpoints.views.cast import WRITTEN, written
from merge_service.checkpoints.views.memory import InMemory
from merge_service.checkpoints.views.rows import Rows, vocabulary_of
from merge_service.checkpoints.weights import Named, Weights
from merge_service.checkpoints.writer import CheckpointWriter, Layout

__all__ = [
    "ADAPTER_FILES",
    "ADAPTER_FOLDER",
    "CONFIG_FILE",
    "DTYPES",
    "HEADER_LIMIT",
    "WEIGHTS_FILE",
    "WRITTEN",
    "Checkpoint",
    "CheckpointWriter",
    "Converted",
    "InMemory",
    "Layout",
    "Named",
    "Rows",
    "Ties",
    "Weights",
    "absolute",
    "adapter_files",
    "admit",
    "buffers",
    "bytes_of",
    "check_finite",
    "convert",
    "entry",
    "locate",
    "of_groups",
    "on_grid",
    "open_weights",
    "overwrites",
    "pack",
    "parts_of",
    "recorded",
    "sha256_of",
    "spare_prefix",
    "unpack",
    "vocabulary_of",
    "write_adapted",
    "written",
]
