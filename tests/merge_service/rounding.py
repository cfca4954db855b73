"""Techniques whose last bits depend on more than this package's arithmetic."""

from merge_service.techniques.families import (
    arcs,
    importance,
    learned,
    matching,
    projections,
    regression,
    spectra,
    stock,
    subspaces,
)

BY_LIBRARY = frozenset(
    one.name
    for family in (spectra, projections, subspaces, regression, importance, matching, learned)
    for one in family.TECHNIQUES
) | {"pcb", "knots_ties"}
"""Techniques whose functions (exp, tanh, eigenvectors) numpy and torch round differently."""
BY_MACHINE = BY_LIBRARY | {one.name for family in (arcs, stock) for one in family.TECHNIQUES}
"""Techniques that use functions (decompositions, exp, arc cosine) whose last bit depends on the processor: not pinned."""
