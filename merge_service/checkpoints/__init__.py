"""Tensors on disk: what a file holds, whether it may take part in a merge, and where the result is written.

A checkpoint is a safetensors file, shards with an index, or a directory with either. It is read through memory maps and written block
by block. Everything that can be wrong with an input is refused here with its reason; nothing is skipped or padded to fit.
"""

from merge_service.checkpoints.admission import admit, check_finite, spare_prefix
from merge_service.checkpoints.buffers import buffers
from merge_service.checkpoints.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, locate, sha256_of
from merge_service.checkpoints.dtypes import DTYPES
from merge_service.checkpoints.shards import bytes_of
from merge_service.checkpoints.target import overwrites
from merge_service.checkpoints.ties import Ties, entry, of_groups, recorded
from merge_service.checkpoints.writer import CheckpointWriter

__all__ = [
    "CONFIG_FILE",
    "DTYPES",
    "WEIGHTS_FILE",
    "Checkpoint",
    "CheckpointWriter",
    "Ties",
    "admit",
    "buffers",
    "bytes_of",
    "check_finite",
    "entry",
    "locate",
    "of_groups",
    "overwrites",
    "recorded",
    "sha256_of",
    "spare_prefix",
]
