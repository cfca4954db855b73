"""Which weights a task starts from and which are served after it, over time (TIME, arXiv 2412.06712).

Everything here is pure: it determines which merges are needed and in which order, never how or where they are made.
"""

from merge_service.timelines.parity import translate, translate_merge
from merge_service.timelines.time import (
    PRESETS,
    Base,
    Expert,
    Merge,
    Merged,
    Strategy,
    Weights,
    check,
    check_served,
    deployed,
    derivation,
    derivations,
    expert_id,
    initial,
    learns,
    measured,
    needs_experts,
    params_for,
    parents,
    policies,
    results,
    warnings,
)

__all__ = [
    "PRESETS",
    "Base",
    "Expert",
    "Merge",
    "Merged",
    "Strategy",
    "Weights",
    "check",
    "check_served",
    "deployed",
    "derivation",
    "derivations",
    "expert_id",
    "initial",
    "learns",
    "measured",
    "needs_experts",
    "params_for",
    "parents",
    "policies",
    "results",
    "translate",
    "translate_merge",
    "warnings",
]
