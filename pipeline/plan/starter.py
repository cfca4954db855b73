"""A first study for a data root and a model, as a file with comments that a person goes on from.

Invariant: the text is a valid study for the root it was made for; what the root does not say is a comment, not a guess.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from merge_service.errors import UserError
from merge_service.files import replace_whole
from pipeline.plan.facts import base_for_now
from pipeline.study.config import study_from
from workers.data.lines import class_names, filled_lines
from workers.data.manifest import (
    CLASSES_FILE,
    KIND_FILE,
    MANIFEST_FILE,
    ROLES,
    SUITE_FILE,
    describe,
    folder,
    read_suite,
)

TRAIN, VAL, TEST = "train", "val", "test"
CHUNKS = 5
"""Tasks that a single dataset of many classes is cut into."""
PER_STEP, PASSES = 64, 3
"""Samples of a batch, and how often a task's own samples come by in the suggested budget."""


@dataclass(frozen=True)
class Outline:
    """What a root says: datasets by role, which of them have val, classes of each task, and the largest known train split (0: unknown)."""

    root: Path
    roles: Mapping[str, tuple[str, ...]]
    without_val: tuple[str, ...]
    classes: Mapping[str, int]
    largest: int = 0
    guessed: bool = False

    def __str__(self) -> str:
        return "; ".join(f"{role}: {', '.join(names)}" for role, names in self.roles.items() if names)


def outline(root: Path) -> Outline:
    """What is known of a root without reading its shards. Raises UserError for a root without tasks.

    Without `suite.json`, sets with train and test are tasks, and sets with test alone are held out.
    """
    if not root.is_dir():
        raise UserError(
            f"{root} does not exist; `temporal-merge import-data SOURCE --out {root}` makes a data root"
        )
    guessed = not (root / SUITE_FILE).is_file()
    roles = _guessed(root) if guessed else {role: tuple(read_suite(root)["roles"][role]) for role in ROLES}
    if not roles["adaptation"]:
        raise UserError(
            f"{root} holds no dataset to learn (role adaptation); import one: `temporal-merge import-data SOURCE --out {root}`"
        )
    homes = {name: folder(root, name) for name in dict.fromkeys((*roles["adaptation"], *roles["held_out"]))}
    without = tuple(name for name, home in homes.items() if not (home / VAL).is_dir())
    classes = {name: _classes(homes[name]) for name in roles["adaptation"]}
    known = [describe(root, name) for name in roles["adaptation"] if (homes[name] / MANIFEST_FILE).is_file()]
    largest = max((info.splits[TRAIN].samples for info in known if TRAIN in info.splits), default=0)
    return Outline(root, roles, without, classes, largest, guessed)


def _guessed(root: Path) -> dict[str, tuple[str, ...]]:
    homes = sorted(
        path for path in root.iterdir() if (path / TEST).is_dir() and not path.name.startswith(".")
    )
    names = {path.name.removeprefix("wds_"): (path / TRAIN).is_dir() for path in homes}
    return {
        "pretraining": (),
        "adaptation": tuple(name for name, taught in names.items() if taught),
        "held_out": tuple(name for name, taught in names.items() if not taught),
    }


def _classes(home: Path) -> int:
    kind = (filled_lines(home / KIND_FILE) or ("classification",))[0]
    return len(class_names(home / CLASSES_FILE)) if kind == "classification" else 0


def write_starter(
    file: Path, root: Path, base: tuple[str, str | None], force: bool = False
) -> tuple[Outline, tuple[str, ...]]:
    """Write a study for the datasets under `root` and a base (`model.config`, `model.pretrained`); what the root says, and notes.

    Raises UserError: a root without tasks, a model that there is not, a file that is there already (unless `force`).
    """
    if file.exists() and not force:
        raise UserError(f"{file} is there already; give another name, or replace it with --force")
    of = outline(root)
    text = starter(file, of, *base)
    made = study_from(yaml.safe_load(text), str(file)).resolved()
    found, notes = base_for_now(made.model)
    if found is not None and found.pretrained is None:
        notes = (*notes, f"the weights of {base[0]} are random; --pretrained gives it others")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(file, text, sync=False)
    return of, notes


def starter(file: Path, of: Outline, model: str, pretrained: str | None) -> str:
    """The text of the study `file`. `model` and `pretrained` are those of its `model` section."""
    name = file.stem
    pool = bool(of.roles["pretraining"])
    mixture = "{pretraining: 0.33, update: 0.34, buffer: 0.33}" if pool else "{update: 0.5, buffer: 0.5}"
    return "\n".join(
        [
            f"# What would run:  temporal-merge plan {file}",
            f"# Run it:          temporal-merge run {file}     (again after any crash: it goes on)",
            f"# What to deploy:  temporal-merge report runs/{name}",
            f"name: {_value(name)}",
            "",
            *_model(model, pretrained),
            "",
            *_data(of),
            "",
            *_stream(of),
            "",
            "# How an expert is trained. A batch is mixed of pretraining data, the task's own (update) and earlier tasks (buffer).",
            f"recipe: {{lr: {_rate(model, pretrained)}, batch_size: {PER_STEP}, precision: fp32, mixture: {mixture}}}",
            "",
            *_budget(of),
            "",
            "# Every entry is a trajectory: one strategy over the whole stream. All of them: docs/studies.md.",
            "grid:",
            "  strategies:",
            "    - zero_shot                      # the base, unchanged",
            "    - offline_merging                # experts of the base, averaged",
            "    - continual_finetuning_replay    # one model, trained on" if pool else
            "    - continual_finetuning           # one model, trained on, without replay",
            "    - best_in_time                   # TIME's choice: start from the running average, serve the running average",
            "  seed: [0]                          # [0, 1, 2] says how much of a difference is chance",
            "",
            *_evaluation(of),
            "",
            "# With GPUs: gpus: 1 for each worker of an expert; precision fp16 or bf16 above.",
            "resources: {experts: {gpus: 0, workers: 1}}",
            "",
        ]
    )  # fmt: skip


def _model(model: str, pretrained: str | None) -> list[str]:
    said = f"{{config: {_value(model)}" + (f", pretrained: {_value(pretrained)}}}" if pretrained else "}")
    return ["# The base: an open_clip name and tag, a directory, local-dir: or hf-hub:.", f"model: {said}"]


def _data(of: Outline) -> list[str]:
    lines = ["# KA is scored on the adaptation sets, ZS on the held-out ones, which no task may teach."]
    if of.guessed:
        lines.append(
            "# The root has no suite.json, so these roles are a guess: sets with train and test are tasks. Move what is held out."
        )
    if not of.roles["held_out"]:
        lines.append(
            "# There is no held-out set, so there is no ZS and no GM. Import one: import-data SOURCE --out ROOT --role held_out"
        )
    if not of.roles["pretraining"]:
        lines.append(
            "# There is no pretraining set to replay. Import one (--role pretraining) to use mixture.pretraining."
        )
    lines += ["data:", f"  root: {_value(str(of.root))}"]
    lines += [
        f"  {role}: [{', '.join(map(_value, of.roles[role]))}]"
        for role in ("adaptation", "held_out", "pretraining")
    ]
    return lines


def _stream(of: Outline) -> list[str]:
    tasks = of.roles["adaptation"]
    counts = [of.classes[name] for name in tasks]
    if len(tasks) == 1 and counts[0] >= 4:
        chunks = min(CHUNKS, counts[0] // 2)
        return [
            f"# The {counts[0]} classes in random order, cut into {chunks} tasks.",
            f"stream: {{order: random, chunks: {chunks}}}",
        ]
    return [
        "# The tasks in the order in which they arrive.",
        f"stream: {{tasks: [{', '.join(map(_value, tasks))}]}}",
    ]


def _budget(of: Outline) -> list[str]:
    steps = min(1000, max(20, -(-PASSES * of.largest // PER_STEP))) if of.largest else 100
    passes = f": {PASSES} passes over the largest task" if of.largest and 20 < steps < 1000 else ""
    return [
        f"# Steps of {PER_STEP} samples for each task{passes}. Or samples_per_task, or total_gflops.",
        f"budget: {{steps_per_task: {steps}}}",
    ]


def _evaluation(of: Outline) -> list[str]:
    if of.without_val:
        why = f"{', '.join(of.without_val[:3])}{', ...' if len(of.without_val) > 3 else ''} has no val split"
        return [
            f"# Scores are on test. To choose on val and judge on test, every set needs val; {why}.",
            "evaluation: {split: test}",
        ]
    return [
        "# Choose on val; judge once, at the end, with --set evaluation.split=test.",
        "evaluation: {split: val}",
    ]


def _rate(model: str, pretrained: str | None) -> str:
    return "1.0e-5" if pretrained or Path(model).is_dir() or ":" in model else "1.0e-3"


def _value(text: str) -> str:
    """A scalar of YAML, quoted where it must be."""
    return yaml.safe_dump([text], default_flow_style=True, width=10**6).strip()[1:-1]
