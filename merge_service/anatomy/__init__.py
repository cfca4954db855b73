"""What tensor names mean: towers, stacks of blocks and depth, and the matrices that lie packed in one tensor.

Names differ from library to library, so nothing here knows a model: a few rules over names and shapes decide, and what they leave
unclear is said to be unclear.
"""

from merge_service.anatomy.structure import Anatomy, anatomy_of, described, modality
from merge_service.moved import names_from

__all__ = [
    "Anatomy",
    "anatomy_of",
    "described",
    "modality",
]

__getattr__ = names_from("merge_service.anatomy.structure")
