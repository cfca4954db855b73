"""Two groups of held-out sets: those whose training side is replayed, and those of which no training batch holds anything.

Every batch holds a share of the pretraining pool. So the score of a set whose training side is in the pool can rise while
a set that is never replayed falls, and one mean would hide both.
Invariant: every held-out set is in exactly one group.
"""

from collections.abc import Collection, Mapping, Sequence

REPLAYED, NEVER = "replayed", "never_replayed"
GROUPS = (REPLAYED, NEVER)
Groups = dict[str, tuple[str, ...]]
"""The held-out sets of each of `GROUPS`, in the order of the held-out role."""


def derived(held_out: Sequence[str], pretraining: Collection[str]) -> Groups:
    """The default groups: a held-out set that is also in the pretraining pool is replayed."""
    return {
        REPLAYED: tuple(name for name in held_out if name in pretraining),
        NEVER: tuple(name for name in held_out if name not in pretraining),
    }


def within(groups: Mapping[str, Collection[str]], held_out: Sequence[str]) -> Groups:
    """The groups of some of the sets, in the order of `held_out`."""
    return {group: tuple(name for name in held_out if name in groups[group]) for group in GROUPS}


def misfit(
    groups: Mapping[str, Sequence[str]], held_out: Collection[str], pretraining: Collection[str]
) -> str:
    """The problems of stated groups, with the names of the sets; "" if there are none."""
    replayed, never = groups[REPLAYED], groups[NEVER]
    wrong = {
        f"in no group; name each in {REPLAYED} or {NEVER}": set(held_out) - {*replayed, *never},
        "in both groups; keep one": {*replayed} & {*never},
        "not held out; remove them from the groups": {*replayed, *never} - set(held_out),
        f"in the pretraining pool, so not {NEVER}; name them in {REPLAYED}": {*never} & set(pretraining),
    }
    return "; ".join(f"{', '.join(sorted(names))}: {text}" for text, names in wrong.items() if names)
