"""Where a checkpoint comes from, as tags one can search and as a manifest that stays with the weights.

Invariant: lineage is read from the plan and the records of what was merged, and names every source by fingerprint and
by the sha256 of its weights.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from merge_service.checkpoint import WEIGHTS_FILE
from pipeline.artifact import Record
from pipeline.steps import BASE, Step

_TAG_CHARACTERS = 4000


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
        self._last: tuple[str, list[dict[str, Any]]] = ("", [])

    def place(self, record: Record) -> str:
        """Where the store holds an artifact: relative to the study's directory, or in a store elsewhere."""
        name = record.fingerprint if "://" in self._store else record.path.name
        return f"{self._store}/{record.kind}/{name}"

    def tags(self, record: Record) -> dict[str, str]:
        """What can be searched: sha256 of the weights, the base's, and the merged experts in order."""
        experts = [f"t{e['t']}:{e['task']}:{str(e['sha256'])[:12]}" for e in self._experts(record)]
        text = " ".join(experts)
        if len(text) > _TAG_CHARACTERS:
            text = f"{len(experts)} experts, see manifest.json"
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
        experts = [f"t={expert['t']} {expert['task']}" for expert in self._experts(record)]
        shown = ", ".join(experts if len(experts) <= 12 else [*experts[:6], "…", *experts[-3:]])
        what = {"merge": "merged from", "train": "the expert of"}.get(record.kind)
        lines = [f"- {what}: {shown}"] if what else []
        return "\n".join(
            [*lines, f"- sha256: `{record.sha256(WEIGHTS_FILE)}`", f"- kept at: `{self.place(record)}`"]
        )

    def manifest(self, record: Record) -> dict[str, Any]:
        """Everything about a checkpoint's origin, to be kept as a file with it."""
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
            "lineage": {"base_sha256": self._base_sha256(record), "experts": self._experts(record)},
            "open_with": 'open_clip.create_model_and_transforms("local-dir:DIRECTORY")',
        }

    def _base_sha256(self, record: Record) -> str:
        step = self._steps.get(record.fingerprint)
        return self._bases[step.base if step else record.fingerprint].sha256(WEIGHTS_FILE) or ""

    def _experts(self, record: Record) -> list[dict[str, Any]]:
        """What was merged, in order; a checkpoint's is asked several times in a row, and may be long."""
        if self._last[0] != record.fingerprint:
            self._last = (record.fingerprint, self._found(record))
        return self._last[1]

    def _found(self, record: Record) -> list[dict[str, Any]]:
        found = {fingerprint: self._steps[fingerprint] for fingerprint in self._sources(record.fingerprint)}
        ordered = sorted(found.values(), key=lambda step: (step.t, step.fingerprint))
        return [
            {
                "t": step.t,
                "task": step.task,
                "fingerprint": step.fingerprint,
                "sha256": self._records[step.fingerprint].sha256(WEIGHTS_FILE),
                "init": BASE if step.inputs["init"] in self._bases else step.inputs["init"],
            }
            for step in ordered
            if step.fingerprint in self._records
        ]

    def _sources(self, fingerprint: str) -> Iterator[str]:
        """The experts merged into these weights, through folds; an expert's own start is not followed."""
        waiting, seen = [fingerprint], set()
        while waiting:
            current = waiting.pop()
            step = self._steps.get(current)
            if step is None or current in seen:
                continue
            seen.add(current)
            if step.kind == "train":
                yield current
            else:
                waiting.extend(step.inputs.values())
