"""The differences between groups: which settings are axes, which are shown, and which groups may be compared."""

from typing import Any

import pandas as pd

from pipeline.report.axes import axes_of, technique_label

BASE = {
    "study": "s", "model": "m", "init": "base", "deploy": "all", "technique": "ties", "mixture": "no replay", "budget": "10 steps",
    "recipe.lr": 0.1, "reference": False,
}  # fmt: skip


def rows(*changes: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([{**BASE, "group": f"g{i}", **change} for i, change in enumerate(changes)])


def test_what_all_groups_have_alike_is_no_axis_and_what_references_lack_neither() -> None:
    reference = {"reference": True, "mixture": "-", "recipe.lr": None}
    assert axes_of(rows({}, {"recipe.lr": 0.2}, reference)).shown == ("recipe.lr",)


def test_setting_that_says_what_another_of_its_family_does_is_shown_once_and_still_compared_at() -> None:
    axes = axes_of(
        rows(
            {"model.pretrained": "a"},
            {"model": "n", "model.pretrained": "b"},
            {"model": "n", "model.pretrained": "b"},
        )
    )
    assert axes.shown == ("model",) and "model.pretrained" in axes.values


def test_settings_of_two_families_that_vary_together_are_both_shown() -> None:
    axes = axes_of(rows({}, {"mixture": "replay", "recipe.lr": 0.2}))
    assert axes.shown == ("mixture", "recipe.lr")


def test_groups_are_compared_in_one_thing_only_if_they_agree_in_all_others() -> None:
    axes = axes_of(rows({}, {"technique": "average"}, {"technique": "average", "mixture": "replay"}))
    one, other, replayed = axes.slices("technique")
    assert one == other == "mixture no replay" and replayed == "mixture replay"
    assert len(set(axes.slices())) == 3


def test_reference_that_lacks_a_setting_takes_no_name_from_those_that_have_it() -> None:
    reference = {"reference": True, "budget.multiplier": None}
    axes = axes_of(
        rows(reference, {"budget.multiplier": 1.0}, {"budget": "20 steps", "budget.multiplier": 2.0})
    )
    assert axes.slices("strategy").tolist() == ["budget 10 steps #2", "budget 10 steps", "budget 20 steps"]


def test_parameters_that_one_technique_alone_has_do_not_keep_it_from_comparison() -> None:
    """Offline merging has no weight and a running average has no schedule: this difference belongs to the strategy."""
    found = rows({"technique.schedule": "uniform"}, {"init": "ema", "deploy": "ema", "technique.weight": 0.5})
    assert axes_of(found).slices("strategy").nunique() == 1
    assert technique_label(found).tolist() == ["ties", "ties"]


def test_parameter_that_was_tried_with_several_values_is_an_axis_and_part_of_the_choice() -> None:
    found = rows(
        {"technique.density": 0.1},
        {"technique.density": 0.2},
        {"technique": "average", "technique.density": None},
    )
    assert axes_of(found).shown == ("technique", "technique.density")
    assert technique_label(found).tolist() == ["ties density=0.1", "ties density=0.2", "average"]
