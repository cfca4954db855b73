"""What every merging technique is: its formula, its parameters, its forms, and its arithmetic on one block.

A technique of somebody's own is declared with `technique` and is then one among the others.
"""

from merge_service.moved import names_from
from merge_service.techniques.definition import Form, Origin, Technique
from merge_service.techniques.joint import Together
from merge_service.techniques.own import check_importable, register, technique
from merge_service.techniques.params import Param, nearest
from merge_service.techniques.place import Election
from merge_service.techniques.registry import broken, forget_table, get, names
from merge_service.techniques.rule import Rule
from merge_service.techniques.tensorwise import TensorRule
from merge_service.techniques.thinning import AtRandom, Band, ByRank, Crumbs, KeepAll, TopMagnitudes

__all__ = [
    "AtRandom",
    "Band",
    "ByRank",
    "Crumbs",
    "Election",
    "Form",
    "KeepAll",
    "Origin",
    "Param",
    "Rule",
    "Technique",
    "TensorRule",
    "Together",
    "TopMagnitudes",
    "broken",
    "check_importable",
    "forget_table",
    "get",
    "names",
    "nearest",
    "register",
    "technique",
]

__getattr__ = names_from("merge_service.techniques.definition", "merge_service.techniques.registry")
