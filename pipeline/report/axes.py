"""The axes in which the groups of a report differ, and which groups may be compared.

Axes come in families: everything that belongs to the choice of a model, a stream, a technique or a budget varies together.

Invariant: two groups are compared only if they agree in every axis except those that the comparison is about. An axis that says
no more than an earlier one of its family is hidden, but still separates groups.
"""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

FAMILIES = {
    "model": ("model", "base", "model."),
    "stream": ("stream.", "tasks", "stream"),
    "strategy": ("init", "deploy", "ema_seed", "strategy.alone"),
    "technique": ("technique", "technique.", "strategy.parity"),
    "mixture": ("mixture",),
    "recipe": ("recipe.",),
    "budget": ("budget", "budget."),
    "evaluation": ("evaluation.",),
}
"""Columns by family, the most informative first; a name that ends in a dot stands for all settings below it."""
ALONE = ("mixture", "recipe")
"""Families whose axes are independent; each axis is shown."""
NOT_AXES = ("recipe.mixture.", "evaluation.split", "technique.seed")
"""Settings that another axis, the page as a whole, or the seed covers."""
OWN = ("technique.", "ema_seed", "strategy.alone")
"""Settings that only some strategies or techniques have; only those that have one can differ in it."""
PLAIN = ("init", "deploy", "technique")
"""Axes whose values need no label."""
MISSING, ALIKE = "-", "all else equal"


@dataclass(frozen=True)
class Axes:
    """`values` are texts: a row per group (its index) and a column per axis in which the groups differ. `shown` are the axes that
    the report shows; `references` are groups that are only compared with.
    """

    values: pd.DataFrame
    shown: tuple[str, ...]
    references: frozenset[str] = frozenset()

    def slices(self, *about: str) -> pd.Series:
        """Which groups may be compared by what a comparison is `about` (families, or single axes): those with the same text.

        The text names the settings that they share: `mixture no replay, recipe.lr 0.001`.
        """
        left = [axis for axis in self.values if axis != "study" and not {axis, family_of(axis)} & {*about}]
        keys = _joined(self.values, left)
        texts = _joined(self.values, [axis for axis in left if axis in self.shown], label=True)
        names: dict[str, str] = {}
        for group in sorted(
            keys.index, key=self.references.__contains__
        ):  # references last: the plain name goes to another group
            key, text = keys[group], texts[group] or ALIKE
            taken = sum(name.split(" #")[0] == text for name in names.values() if key not in names)
            names.setdefault(key, f"{text}{f' #{taken + 1}' if taken else ''}")
        return keys.map(names)


def axes_of(rows: pd.DataFrame) -> Axes:
    """The axes of groups: `rows` has one row per group; its column `reference` marks those that are only compared with."""
    told = rows[~rows["reference"]] if (~rows["reference"]).sum() > 1 else rows
    kept: dict[str, pd.Series] = {}
    shown: list[str] = []
    for axis in ["study", *_columns(rows)]:
        texts = rows[axis].map(text_of)
        here = texts[told.index]
        if here.nunique() < 2:
            continue
        said = _said_already(axis, here, {name: kept[name][told.index] for name in shown})
        if said and axis.startswith(OWN):
            continue  # a parameter that only one technique or form has is no difference
        kept[axis] = texts
        if not said:
            shown.append(axis)
    values = pd.DataFrame(kept, index=rows.index)
    references = frozenset(rows.loc[rows["reference"], "group"])
    return Axes(values.set_axis(rows["group"], axis=0), tuple(shown), references)


def technique_label(rows: pd.DataFrame) -> pd.Series:
    """The technique of each group, with the parameters in which groups of the same technique differ."""
    params = [name for name in rows.columns if name.startswith("technique.") and name not in NOT_AXES]
    labels = rows["technique"].astype(str).copy()
    for technique, members in rows.groupby("technique", sort=False):
        differing = [name for name in params if members[name].dropna().map(text_of).nunique() > 1]
        for index, row in members.iterrows():
            said = [f"{name.removeprefix('technique.')}={text_of(row[name])}" for name in differing if not _missing(row[name])]  # fmt: skip
            labels[index] = " ".join([str(technique), *said])
    return labels


def family_of(axis: str) -> str:
    """The family of a column; its own name if it has none."""
    for family, names in FAMILIES.items():
        if any(axis == name or (name.endswith(".") and axis.startswith(name)) for name in names):
            return family
    return axis


def text_of(value: Any) -> str:
    """A setting as text."""
    if _missing(value):
        return MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)


def _columns(rows: pd.DataFrame) -> list[str]:
    found: list[str] = []
    for names in FAMILIES.values():
        for name in names:
            found += [c for c in rows.columns if c == name or (name.endswith(".") and c.startswith(name))]
    return [name for name in dict.fromkeys(found) if not name.startswith(NOT_AXES)]


def _said_already(axis: str, texts: pd.Series, shown: dict[str, pd.Series]) -> bool:
    """Whether the shown axes of its family distinguish the same groups, or, for a technique's parameter, the technique does."""
    family = family_of(axis)
    if family in ALONE:
        return False
    known = [values for name, values in shown.items() if family_of(name) == family]
    if axis.startswith(OWN):
        with_it = texts[texts != MISSING]
        head = shown.get("technique", pd.Series("", index=texts.index))[with_it.index]
        return bool(
            (with_it.groupby(head if axis.startswith("technique.") else head * 0).nunique() < 2).all()
        )
    if not known:
        return False
    together = pd.concat(known, axis=1).agg("\0".join, axis=1)
    return bool((texts.groupby(together).nunique() < 2).all()) and axis not in ("init", "deploy")


def _joined(values: pd.DataFrame, axes: list[str], label: bool = False) -> pd.Series:
    if not axes:
        return pd.Series("", index=values.index)
    parts = [("" if not label or axis in PLAIN else f"{axis} ") + values[axis] for axis in axes]
    if label and {"init", "deploy"} <= {*axes}:
        parts = [values["init"] + " → " + values["deploy"]] + [
            part for axis, part in zip(axes, parts) if axis not in ("init", "deploy")
        ]
    return pd.concat(parts, axis=1).agg((", " if label else "\0").join, axis=1)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
