"""The page beside the weights of a base: how it was made, and what it scores.

Invariant: every number on it comes from the recipe and from what `workers.pretrain` measured; the page beside shipped weights and
their `scores.json` are written together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.data.zero_shot import derived
from workers.pretrain_recipe import Copies, Pretraining

NOTES = {
    "photos_a": "patches of another region of the photographs whose other regions were taught",
    "icons": "filled icons, most of which were taught as outlines only",
    "emoji_names": "emoji that were never seen, found by name; retrieval, so its scores are low",
    "mnist": "digits of the same collection that were not taught",
    "digits8": "digits by other hands at 8x8 pixels; no picture of the set is taught",
    "animals": "cut-outs that were not taught",
}


def page(recipe_file: Path, settings: Pretraining, result: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    weights, train, rule, batch = (
        result["weights"],
        result["train"],
        settings.stop,
        settings.recipe.batch_size,
    )
    checks = "\n".join(f"| {step} | {score:.4f} |" for step, score in result["checks"])
    notes = "\n".join(f"- `{name}`: {NOTES[name]}." for name in result["roles"]["held_out"] if name in NOTES)
    return f"""# {recipe_file.resolve().parent.name}: a base checkpoint of the mini suite

This command wrote the weights, `scores.json` and this page; it writes equal bytes on an equal machine. `--seed S` makes the base of
another seed.

```sh
python -m workers.pretrain {recipe_file} --out DIR
```

The base opens with `open_clip.create_model_and_transforms("local-dir:DIR")`. It has {weights["all"]:,} weights, of which
{weights["token_table"]:,} are the table of tokens, stored in {settings.storage}.

**Taught** were training splits, in altered copies (xN: N of each picture); seed {result["seed"]}.
Of the pretraining pool, which experts may replay: {_copies(settings.pool)}.
Of sets that only the base is taught: {_copies(settings.base_only)}.

**When to stop.** Every {rule.every} steps of {batch} pictures the mean zero-shot score over the validation splits of the held-out sets is
measured. Training ends when this mean has not risen by {rule.rise:g} in {rule.patience} checks in a row, or after {rule.steps:,} steps. The best check is
kept. No test split takes part. Training ended after {train["steps"]:,} steps ({train["samples"]:,} pictures); the check at step {result["kept"]:,} is kept.
All of it took {result["minutes"]} minutes of one core.

| step | mean on validation |
|---|---|
{checks}

## Zero-shot scores
Top-1 accuracy on whole splits; for retrieval recall@5, as the mean of both directions. The validation splits chose the weights, the
test splits did not. Tasks are the sets of the stream; nothing of them was taught.

{table(result)}

What the tests of the held-out sets show:

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
