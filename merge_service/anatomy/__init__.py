"""The meaning of tensor names: towers, stacks of blocks and depth, and the matrices packed in one tensor.

A merge depends on the protocol `Anatomy`. Tensor names differ between libraries, so no rule of `ByName` is specific to a model. It
reports the names that its rules leave unclear.
"""

from merge_service.anatomy.protocol import Anatomy
from merge_service.anatomy.structure import ByName, anatomy_of, described, modality
from merge_service.moved import names_from

__all__ = [
    "Anatomy",
    "ByName",
    "anatomy_of",
    "described",
    "modality",
]

__getattr__ = names_from("merge_service.anatomy.structure")
