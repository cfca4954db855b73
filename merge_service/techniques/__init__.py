"""What every merging technique is: its formula, its parameters, its forms, and its arithmetic on one block.

A technique of somebody's own is declared with `technique` and is then one among the others.
"""

from merge_service.techniques.definition import Form, Origin, Technique
from merge_service.techniques.own import check_importable, register, technique
from merge_service.techniques.params import Param, nearest
from merge_service.techniques.registry import broken, forget_table, get, names

__all__ = [
    "Form",
    "Origin",
    "Param",
    "Technique",
    "broken",
    "check_importable",
    "forget_table",
    "get",
    "names",
    "nearest",
    "register",
    "technique",
]
