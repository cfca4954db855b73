"""Where a checkpoint comes from, as tags one can search and as a manifest that stays with the weights.

Invariant: lineage is read from the plan and the records of what was merged, and names every source by fingerprint and
by the sha256 of its weights.
"""

from collections.abc import Mapping
from typing import Any

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.plan.steps import BASE, Step
from pipeline.store.artifact import Record

_TAG_CHARACTERS = 4000
LISTED = 64
"""Experts that a checkpoint's lineage names one by one."""


class Lineage:
    """Lineage within one plan. `records` may still grow; a source is there before what is made of it."""

    def __init__(
        self,
        steps: Mapping[str, Step],
        records: Mapping[str, Record],
        bases: Mapping[str, Record],
        store: str = "store",
    ) -> None:
        self._store = store
        self._steps, self._records, self._bases = steps, records, bases
        self._merged: dict[str, tuple[int, list[dict[str, Any]]]] = {}

    def place(self, record: Record) -> str:
        """Where the store holds an artifact: relative to the study's directory, or in a store elsewhere."""
        name = record.fingerprint if "://" in self._store else record.path.name
        return f"{self._store}/{record.kind}/{name}"

    def tags(self, record: Record) -> dict[str, str]:
        """What can be searched: sha256 of the weights, the base's, and the merged experts in order."""
        total, experts = self._experts(record.fingerprint)
        text = " ".join(f"t{e['t']}:{e['task']}:{str(e['sha256'])[:12]}" for e in experts)
        if total > len(experts) or len(text) > _TAG_CHARACTERS:
            text = f"{total} experts, see manifest.json"
        tags = {
            "sha256": record.sha256(WEIGHTS_FILE) or "",
            "fingerprint": record.fingerprint,
            "store": self.place(record),
            "lineage.base": self._base_sha256(record),
            "lineage.experts": text,
        }
        return {key: value for key, value in tags.items() if value}

    def note(self, record: Record) -> str:
        """The same for people, in Markdown."""
        total, experts = self._experts(record.fingerprint)
        names = [f"t={expert['t']} {expert['task']}" for expert in experts]
        shown = ", ".join(names if total <= 12 else [f"{total} experts, the last", *names[-3:]])
        what = {"merge": "merged from", "train": "the expert of"}.get(record.kind)
        lines = [f"- {what}: {shown}"] if what else []
        return "\n".join(
            [*lines, f"- sha256: `{record.sha256(WEIGHTS_FILE)}`", f"- kept at: `{self.place(record)}`"]
        )

    def manifest(self, record: Record) -> dict[str, Any]:
        """Everything about a checkpoint's origin, to be kept as a file with it.

        Of very many experts the newest are listed; `inputs` leads to the rest, record by record.
        """
        total, experts = self._experts(record.fingerprint)
        return {
            "format": 1,
            "kind": record.kind,
            "fingerprint": record.fingerprint,
            "store": self.place(record),
            "files": {name: dict(entry) for name, entry in sorted(record.files.items())},
            "created_ms": record.created_ms,
            "versions": dict(record.versions),
            "spec": record.spec,
            "inputs": dict(record.inputs),
            "lineage": {
                "base_sha256": self._base_sha256(record),
                "experts_total": total,
                "experts": experts,
            },
            "open_with": 'open_clip.create_model_and_transforms("local-dir:DIRECTORY")',
        }

    def _base_sha256(self, record: Record) -> str:
        step = self._steps.get(record.fingerprint)
        return self._bases[step.base if step else record.fingerprint].sha256(WEIGHTS_FILE) or ""

    def _experts(self, fingerprint: str) -> tuple[int, list[dict[str, Any]]]:
        """How many experts went into these weights, through folds, and the newest of them by t.

        An expert's own start is not followed. What a fold has before it is known already, so the thousandth costs what the
        second did.
        """
        if fingerprint not in self._merged:
            step = self._steps.get(fingerprint)
            if step is None:
                self._merged[fingerprint] = 0, []
            elif step.kind == "train":
                self._merged[fingerprint] = 1, [self._expert(step)]
            else:
                sources = [self._experts(source) for source in dict.fromkeys(step.inputs.values())]
                listed = [expert for _, experts in sources[-LISTED:] for expert in experts]
                listed.sort(key=lambda expert: (expert["t"], expert["fingerprint"]))
                self._merged[fingerprint] = sum(total for total, _ in sources), listed[-LISTED:]
        return self._merged[fingerprint]

    def _expert(self, step: Step) -> dict[str, Any]:
        record = self._records.get(step.fingerprint)
        return {
            "t": step.t,
            "task": step.task,
            "fingerprint": step.fingerprint,
            "sha256": record.sha256(WEIGHTS_FILE) if record is not None else None,
            "init": BASE if step.inputs["init"] in self._bases else step.inputs["init"],
        }
