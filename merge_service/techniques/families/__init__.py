"""The techniques: one file per family, with each technique's row and its rule.

A row is literal data: formula, paper, parameters, and the objects that make up the technique. Where published implementations
disagree, a parameter chooses between them, and its text names them; the default is the authors'. A new technique is one more row
in its family's file. It is then listed, validated, documented and tested like all others.

Invariant: a technique that breaks one of the common laws declares it in `breaks`, and nothing else is exempt.
"""

from merge_service.techniques.families import (
    arcs,
    averages,
    balance,
    elections,
    importance,
    learned,
    lines,
    matching,
    projections,
    regression,
    selections,
    spectra,
    stock,
    subspaces,
    sums,
)

FAMILIES = (
    averages,
    sums,
    elections,
    selections,
    balance,
    lines,
    arcs,
    stock,
    spectra,
    projections,
    subspaces,
    regression,
    importance,
    matching,
    learned,
)
"""In the order of the documentation."""
TECHNIQUES = tuple(technique for family in FAMILIES for technique in family.TECHNIQUES)
