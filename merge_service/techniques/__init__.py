"""Merging techniques: formula, parameters, forms, and arithmetic on one block.

A user's own technique is declared with `technique` and is then treated like the built-in ones.
"""

from merge_service.moved import names_from
from merge_service.techniques.definition import Evidence, Form, Origin, Technique
from merge_service.techniques.families.regression import fitted, shrunk
from merge_service.techniques.files import use_file
from merge_service.techniques.own import check_importable, register, technique
from merge_service.techniques.params import Param, nearest
from merge_service.techniques.place import Election
from merge_service.techniques.registry import broken, forget_table, get, names
from merge_service.techniques.rule import Rule, TensorRule, Together
from merge_service.techniques.scaling import Factor
from merge_service.techniques.shares import weights_of
from merge_service.techniques.thinning import AtRandom, Band, ByRank, Crumbs, KeepAll, TopMagnitudes

__all__ = [
    "AtRandom",
    "Band",
    "ByRank",
    "Crumbs",
    "Election",
    "Evidence",
    "Factor",
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
    "fitted",
    "forget_table",
    "get",
    "names",
    "nearest",
    "register",
    "shrunk",
    "technique",
    "use_file",
    "weights_of",
]

__getattr__ = names_from(
    "merge_service.techniques.definition",
    "merge_service.techniques.params",
    "merge_service.techniques.registry",
)
