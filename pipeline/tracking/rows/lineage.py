"""The origin of a checkpoint, as searchable tags and as a manifest that stays with the weights.

Invariant: lineage is read from the plan and the records of the merged models, and names every source by fingerprint and by the
sha256 of its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_service.checkpoints import WEIGHTS_FILE
from pipeline.kinds.table import KINDS
from pipeline.plan.steps import BASE, Step
from pipeline.store.artifact import ADAPTER, WEIGHTS_SUFFIX, Record
from pipeline.tracking.rows.names import OPENING

_TAG_CHARACTERS = 4000
LISTED = 64
"""Most experts that the lineage of a checkpoint names one by one."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that becomes a model: its record, its t and task, and the trajectory that `export` needs (None: an expert)."""

    record: Record
    t: int
    task: str
    trajectory: str | None = None


@dataclass(frozen=True)
class Described:
    """The description of every logged checkpoint. `common` are the tags of every run and model of the study."""

    lineage: "Lineage"
    common: Mapping[str, str]
    log_weights: bool
    recipes: frozenset[str] = frozenset()

    def tags(self, checkpoint: Checkpoint, note: str) -> dict[str, str]:
        """Tags for searching, and a description of the model, because the page of a model shows no tags."""
        record = checkpoint.record
        text = "\n\n".join([note, self.lineage.note(record), self._absent(checkpoint) or OPENING])
        return {**self.common, "kind": "model", **self.lineage.tags(record), "mlflow.note.content": text}

    def files(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The manifest, where the files are, and which go with the model: a whole weights directory with its tokenizer, or none.

        If none, `weights` of the manifest says why, and where they are.
        """
        record, absent = checkpoint.record, self._absent(checkpoint)
        manifest = {"study": self.common["study"], "t": checkpoint.t, "task": checkpoint.task}
        manifest |= self.lineage.manifest(record) | ({"weights": absent} if absent else {})
        return {
            "manifest": manifest,
            "store": self.lineage.place(record),
            "files": [] if absent else sorted(name for name in record.files if not name.startswith(ADAPTER)),
        }

    def _absent(self, checkpoint: Checkpoint) -> str | None:
        """Why MLflow has no weights of a checkpoint, and how to get them, as a sentence for people; None if it has them."""
        record = checkpoint.record
        if record.fingerprint in self.recipes:
            why, remedy = "they are kept as a recipe", "storage.keep=all"
        elif not self.log_weights:
            why, remedy = "tracking.log_weights: false", "tracking.log_weights=true"
        else:
            return None
        place = (
            f"they are in the run's store ({self.lineage.place(record)})"
            if checkpoint.trajectory is None
            else f"`temporal-merge export OUT --trajectory {checkpoint.trajectory} --t {checkpoint.t} --out DIR` writes them for open_clip"
        )
        return (
            f"MLflow has no weights of this model ({why}); {place}. To load it from MLflow, run the study again with "
            f"`--set {remedy}`; no step is done again for that."
        )


class Lineage:
    """Lineage within one plan. `records` may still grow; a source is recorded before what is merged from it."""

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
        """The place of an artifact: relative to the study's directory, or in a store elsewhere."""
        name = record.fingerprint if "://" in self._store else record.path.name
        return f"{self._store}/{record.kind}/{name}"

    def tags(self, record: Record) -> dict[str, str]:
        """Searchable values: sha256 of the weights, of the base, and of an expert's adapter, and the merged experts in order."""
        total, experts = self._experts(record.fingerprint)
        text = " ".join(f"t{e['t']}:{e['task']}:{str(e['sha256'])[:12]}" for e in experts)
        if total > len(experts) or len(text) > _TAG_CHARACTERS:
            text = f"{total} experts, see manifest.json"
        tags = {
            "sha256": record.sha256(WEIGHTS_FILE) or "",
            "adapter": adapter_of(record),
            "fingerprint": record.fingerprint,
            "store": self.place(record),
            "lineage.base": self._base_sha256(record),
            "lineage.adapters": " ".join(
                str(e["adapter_sha256"])[:12] for e in experts if "adapter_sha256" in e
            )[:_TAG_CHARACTERS],
            "lineage.experts": text,
        }
        return {key: value for key, value in tags.items() if value}

    def note(self, record: Record) -> str:
        """The same as Markdown."""
        total, experts = self._experts(record.fingerprint)
        names = [f"t={expert['t']} {expert['task']}" for expert in experts]
        shown = ", ".join(names if total <= 12 else [f"{total} experts, the last", *names[-3:]])
        what = {"merge": "merged from", "train": "the expert of", "expert": "the given expert of"}.get(
            record.kind
        )
        lines = [f"- {what}: {shown}"] if what else []
        if adapter := adapter_of(record):
            lines.append(
                f"- adapter: `{adapter}`, on weights that its `init` names; the base is `{self._base_sha256(record)}`"
            )
        return "\n".join(
            [*lines, f"- sha256: `{record.sha256(WEIGHTS_FILE)}`", f"- kept at: `{self.place(record)}`"]
        )

    def manifest(self, record: Record) -> dict[str, Any]:
        """The full origin of a checkpoint, for a file beside it.

        Of very many experts the newest are listed; `inputs` leads to the others, record by record.
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
        """The number of experts in these weights, through folds, and the newest of them by t.

        The model that an expert started from is not followed. The result for a fold's running model is cached, so the thousandth
        fold costs as much as the second.
        """
        if fingerprint not in self._merged:
            step = self._steps.get(fingerprint)
            if step is None or not KINDS[step.kind].weights:
                self._merged[fingerprint] = 0, []
            elif step.kind in ("train", "expert"):
                self._merged[fingerprint] = 1, [self._expert(step)]
            else:
                sources = [self._experts(source) for source in dict.fromkeys(step.inputs.values())]
                listed = [expert for _, experts in sources[-LISTED:] for expert in experts]
                listed.sort(key=lambda expert: (expert["t"], expert["fingerprint"]))
                self._merged[fingerprint] = sum(total for total, _ in sources), listed[-LISTED:]
        return self._merged[fingerprint]

    def _expert(self, step: Step) -> dict[str, Any]:
        record = self._records.get(step.fingerprint)
        adapter = adapter_of(record) if record is not None else ""
        return {
            **({"adapter_sha256": adapter} if adapter else {}),
            "t": step.t,
            "task": step.task,
            "fingerprint": step.fingerprint,
            "sha256": record.sha256(WEIGHTS_FILE) if record is not None else None,
            "init": BASE if step.inputs.get("init", step.base) in self._bases else step.inputs["init"],
        }


def adapter_of(record: Record) -> str:
    """The sha256 of the adapter that an expert is kept as; empty for one that is kept whole."""
    name = next((one for one in record.files if one.startswith(ADAPTER) and one.endswith(WEIGHTS_SUFFIX)), "")
    return record.sha256(name) or ""
