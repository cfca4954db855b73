"""The page beside the weights of a base: its recipe, its checks and its scores.

A user of a shipped base must be able to see how it was trained and selected.
Invariant: every number on the page comes from the recipe or from measurements of `workers.pretrain`; the page and `scores.json` of
shipped weights are written together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.data.zero_shot import derived
from workers.pretrain.recipe import Copies, Pretraining

NOTES = {
    "photos_a": "patches of photographs, from another region than the training patches",
    "icons": "filled icons; most of them were trained on as outlines only",
    "emoji_names": "new emoji, retrieved by name; retrieval scores are low",
    "mnist": "digits of the same collection, not trained on",
    "digits8": "digits of other writers at 8x8 pixels; the set is not trained on",
    "animals": "cut-outs, not trained on",
}


def page(recipe_file: Path, settings: Pretraining, result: Mapping[str, Any]) -> str:
    """The page as Markdown; `result` is the content of `scores.json`."""
    weights, train, rule, batch = (
        result["weights"],
        result["train"],
        settings.stop,
        settings.recipe.batch_size,
    )
    checks = "\n".join(f"| {step} | {score:.4f} |" for step, score in result["checks"])
    notes = "\n".join(f"- `{name}`: {NOTES[name]}." for name in result["roles"]["held_out"] if name in NOTES)
    return f"""# {recipe_file.resolve().parent.name}: a base checkpoint of the mini suite

This command writes the weights, `scores.json` and this page, with equal bytes on equal machines. `--seed S` makes a base with another
seed.

```sh
python -m workers.pretrain {recipe_file} --out DIR
```

The base opens with `open_clip.create_model_and_transforms("local-dir:DIR")`. It has {weights["all"]:,} weights, of which
{weights["token_table"]:,} are the table of tokens, stored in {settings.storage}.

**Training data** are altered copies of training splits (xN: N copies of each picture), with seed {result["seed"]}:

- sets of the pretraining pool, which experts may replay: {_copies(settings.pool)}
- sets for the base alone: {_copies(settings.base_only)}

**Stopping rule.** A check every {rule.every} steps of {batch} pictures measures the mean zero-shot score over the validation splits of the
held-out sets. Training ends when this mean has not risen by {rule.rise:g} in {rule.patience} checks in a row, or after {rule.steps:,} steps. The
weights of the best check are kept; no test split is read. Here training ended after {train["steps"]:,} steps ({train["samples"]:,} pictures), and
the weights of step {result["kept"]:,} were kept. It took {result["minutes"]} minutes of one core.

| step | mean on validation |
|---|---|
{checks}

## Zero-shot scores
Scores are top-1 accuracy on whole splits; for retrieval, recall@5 as the mean of both directions. The weights were selected on the
validation splits and not on the test splits. Tasks are the sets of the stream; no picture of them was trained on.

{table(result)}

Test splits of the held-out sets:

{notes or "see the suite"}
"""


def table(result: Mapping[str, Any]) -> str:
    """The scores as a Markdown table, held-out sets first, by group; chance is that of the test split."""
    lines = ["| group | dataset | test images | zero-shot, test | zero-shot, validation | chance |", "|---|---|---|---|---|---|"]  # fmt: skip
    for group, names in _groups(result["roles"]).items():
        for name in names:
            lines.append(
                f"| {group} | {name} | {result['samples'][name]} | {result['scores'][name]:.3f} "
                f"| {_mean(result['val_scores'], [name])} | {result['chance'][name]:.3f} |"
            )
        test, val = (_mean(result[kind], names) for kind in ("scores", "val_scores"))
        lines.append(f"| {group} | **mean** | | **{test}** | **{val}** | |".replace("**-**", "-"))
    return "\n".join(lines)


def _groups(roles: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    held_out = derived(roles["held_out"], roles["pretraining"])
    return {group.replace("_", " "): names for group, names in held_out.items()} | {
        "tasks": roles["adaptation"]
    }


def _mean(scores: Mapping[str, float], names: Sequence[str]) -> str:
    return (
        f"{sum(scores[name] for name in names) / len(names):.3f}"
        if names and scores.keys() >= set(names)
        else "-"
    )


def _copies(taught: Mapping[str, Copies]) -> str:
    return ", ".join(f"{name} x{copies.copies}" for name, copies in taught.items()) or "none"
