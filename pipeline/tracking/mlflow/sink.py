"""Delivers outbox rows to MLflow, so that delivering a row again changes nothing.

Weights are linked, not copied, if MLflow's artifacts are on the store's own file system (the default), so logging every merged
checkpoint costs no disk. Nothing is pickled; a model is the files open_clip opens plus `manifest.json`.

Invariant: every run and model is looked up by our own tags before it is created, every metric has the timestamp of its record,
and no layer below retries a request that creates something. After any failure the server's content is read again first, because a
request may succeed although its answer is lost. Answers of the server are not trusted: runs without our tags are ignored, no
redirect is followed, and no answer makes this process write a file.
"""

import contextlib
import getpass
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import TrackingError
from pipeline.study.addresses import redact
from pipeline.tracking.mlflow.artifacts import Artifacts, Refused, safe_name
from pipeline.tracking.mlflow.client import Limit, PatientClient, pages
from pipeline.tracking.mlflow.database import LocalClient, opened
from pipeline.tracking.mlflow.experiment import find_or_make
from pipeline.tracking.mlflow.local import (
    LOCAL_ARTIFACTS,
    LOCAL_DB,
    follow_home,
    guard_environment,
    local_uri,
    make_local_store,
)
from pipeline.tracking.outbox import Entry

PLAN_TAG = "temporal_merge.plan"
RUN_TAG = "temporal_merge.run_key"
MODEL_TAG = "temporal_merge.model_key"
MODEL_ID_TAG = "temporal_merge.model_id"
MISSING_TAG = "temporal_merge.weights_missing"
ERROR_TAG = "error"
REGISTERED_NOTE = "What the best trajectory of a study serves at its last t, study after study; see the tags of each version."

_BATCH = 90
_REFUSALS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE", "RESOURCE_CONFLICT"}
)
_REGISTRY = frozenset({"register", "alias"})  # one that is missing, or read-only, must not block later rows
_NO_REGISTRY = frozenset({"PERMISSION_DENIED", "FEATURE_DISABLED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"})


@dataclass(frozen=True)
class Sent:
    """Rows that the tracking store has, or (with `refused`, the reason) one row that it refuses for good."""

    entries: Sequence[Entry]
    refused: str | None = None


@dataclass(frozen=True)
class _Model:
    model_id: str
    location: str
    ready: bool
    lacks_weights: bool = False


class MlflowSink:
    """One tracking store, one experiment. Used by one thread.

    `uri` None means sqlite in `out` with artifacts beside it; anything else is an MLflow tracking URI.
    """

    def __init__(self, out: Path, uri: str | None, experiment: str, limit: Limit | None = None) -> None:
        self.out = out.resolve()
        self.uri = uri
        self.experiment = experiment
        self._limit = limit or Limit()
        self._artifacts = Artifacts(self.out, uri)
        self._client: Any = None
        self._experiment_id = ""
        self._runs: dict[str, dict[str, str]] = {}
        self._failed: set[str] = set()
        self._models: dict[str, dict[str, _Model]] = {}
        self._operations: dict[str, Callable[[dict[str, Any]], None]] = {
            "run": self._run,
            "log": self._log,
            "model": self._model,
            "artifact": self._artifact,
            "status": self._status,
            "register": self._register,
            "alias": self._alias,
        }

    def connect(self) -> None:
        """Open the store, and create the experiment if it is missing. Slow the first time (imports, database migrations)."""
        if self._client is not None:
            return
        guard_environment()
        from mlflow import MlflowClient

        if self.uri is None:
            make_local_store(self.out)
            follow_home(self.out)
        uri = self.uri or local_uri(self.out)
        self._limit.apply()
        client = PatientClient(MlflowClient(tracking_uri=uri, registry_uri=uri), self._limit)
        self._experiment_id, location = find_or_make(
            client, self.experiment, (self.out / LOCAL_ARTIFACTS).as_uri() if self.uri is None else None
        )
        local = (
            opened(client, self.out / LOCAL_DB, self._experiment_id, location) if self.uri is None else None
        )
        self._client = local or client

    def forget(self) -> None:
        """Drop everything cached, after a failure; it is looked up again."""
        if isinstance(self._client, LocalClient):
            self._client.close()
        self._client = None
        self._runs.clear()
        self._failed.clear()
        self._models.clear()

    def deliver(self, entries: Sequence[Entry]) -> Iterator[Sent]:
        """Send rows in order and yield them as soon as they are safe: in OUT all at once, since one transaction holds them, on a
        server one by one. Raises TrackingError at the first row that fails for now.
        """
        held: list[Sent] = []
        failure = None
        for unit in _units(entries):
            try:
                held += self._unit(unit)
            except TrackingError as error:
                failure = error
                break
            if not isinstance(self._client, LocalClient):
                yield from held
                held = []
        self._guarded("the tracking store", self._flush)
        yield from held
        if failure is not None:
            raise failure

    def _unit(self, entries: Sequence[Entry]) -> list[Sent]:
        """Send rows together; if they are refused, one by one, because the others may still be accepted."""
        try:
            self._send(entries)
            return [Sent(entries)]
        except Refused as error:
            if len(entries) == 1:
                return [Sent(entries, str(error))]
            return [sent for entry in entries for sent in self._unit([entry])]

    def _send(self, entries: Sequence[Entry]) -> None:
        body = _merged([entry.payload for entry in entries])
        refused = _REFUSALS | (_NO_REGISTRY if body["op"] in _REGISTRY else frozenset())

        def send() -> None:
            self.connect()
            self._operations[body["op"]](body)

        self._guarded(entries[0].key, send, refused)

    def _guarded(self, key: str, work: Callable[[], None], refused: frozenset[str] = frozenset()) -> None:
        """Raise Refused for MLflow's errors with these codes, TrackingError for all others."""
        from mlflow.exceptions import MlflowException

        try:
            work()
        except TrackingError:
            raise
        except MlflowException as error:
            kind = Refused if error.error_code in refused else TrackingError
            raise kind(f"{key}: {error.error_code}: {_short(error)}") from error
        except Exception as error:  # an unexpected answer can fail anywhere inside the client
            raise TrackingError(f"{key}: {type(error).__name__}: {_short(error)}") from error

    def _flush(self) -> None:
        if isinstance(self._client, LocalClient):
            self._client.flush()

    # --- rows -----------------------------------------------------------------------------------------------------

    def _run(self, body: dict[str, Any]) -> None:
        plan, key = body["plan"], body["run"]
        run_id = self._known_runs(plan).get(key)
        if run_id is None:
            tags = {**body["tags"], PLAN_TAG: plan, RUN_TAG: key, **_user_tag()}
            if body["parent"] is not None:
                tags["mlflow.parentRunId"] = self._run_id(plan, body["parent"])
            run = self._client.create_run(
                self._experiment_id, start_time=body["start_ms"], tags=tags, run_name=body["name"]
            )
            if run.data.tags.get(RUN_TAG) != key:
                raise TrackingError(f"{key}: the server answered with another run than the one asked for")
            run_id = self._runs[plan][key] = run.info.run_id
        self._log_params(run_id, body["params"])
        if body["datasets"]:
            self._client.log_inputs(run_id, [_dataset_input(dataset) for dataset in body["datasets"]])

    def _log(self, body: dict[str, Any]) -> None:
        from mlflow.entities import Metric, RunTag

        run_id = self._run_id(body["plan"], body["run"])
        models = {key: self._model_id(body["plan"], key) for *_, key in body["metrics"] if key is not None}
        metrics = [
            Metric(key, value, stamp, step, models.get(model), dataset, digest)
            for key, value, step, stamp, dataset, digest, model in body["metrics"]
        ]
        tags = [RunTag(key, value) for key, value in body["tags"].items()]
        # At most 90 at once: MLflow's own duplicate handling of model metrics works on batches of 100 names.
        for start in range(0, max(len(metrics), 1), _BATCH):
            chunk = metrics[start : start + _BATCH]
            self._client.log_batch(run_id, metrics=chunk, tags=tags if start == 0 else [], synchronous=True)

    def _model(self, body: dict[str, Any]) -> None:
        from mlflow.entities import LoggedModelOutput

        plan, key = body["plan"], body["model"]
        run_id = self._run_id(plan, body["run"])
        known = self._known_models(plan).get(key)
        made_now = known is None
        if known is None:
            model = self._client.create_logged_model(
                self._experiment_id,
                name=body["name"],
                source_run_id=run_id,
                tags={**body["tags"], PLAN_TAG: plan, MODEL_TAG: key, **_user_tag()},
                params=body["params"],
                model_type=body["type"],
            )
            known = self._models[plan][key] = _Model(model.model_id, model.artifact_location, False)
        if not known.ready or (known.lacks_weights and body["files"]):
            where = {"model_id": known.model_id, "run_id": run_id, "artifact_path": known.location}
            missing = self._artifacts.put_model(self._client, where, body)
            lacks = f"{', '.join(missing)} left the store" if missing else body["manifest"].get("weights", "")
            if lacks or known.lacks_weights:
                self._client.set_logged_model_tags(known.model_id, {MISSING_TAG: lacks})
            self._client.finalize_logged_model(known.model_id, "READY")
            self._models[plan][key] = replace(known, ready=True, lacks_weights=bool(lacks))
        if body.get("is_input"):
            inputs = [key]
        else:
            inputs = body.get("inputs", [])
            if made_now or known.model_id not in self._outputs(run_id):
                self._client.log_outputs(run_id, [LoggedModelOutput(known.model_id, body["step"])])
        inputs = self._model_inputs(plan, inputs)
        if inputs:
            self._client.log_inputs(run_id, models=inputs)

    def _artifact(self, body: dict[str, Any]) -> None:
        run_id = self._run_id(body["plan"], body["run"])
        location = self._client.get_run(run_id).info.artifact_uri
        with tempfile.TemporaryDirectory(prefix="temporal-merge-") as scratch:
            source = Path(scratch) / safe_name(body["name"])
            if body["text"] is None:
                shutil.copyfile(self._artifacts.inside(body["path"]), source)
            else:
                source.write_text(body["text"], encoding="utf-8")
            self._artifacts.put(source, location, lambda: self._client.log_artifact(run_id, str(source)))

    def _status(self, body: dict[str, Any]) -> None:
        run_id = self._run_id(body["plan"], body["run"])
        if body["error"] is not None:
            self._client.set_tag(run_id, ERROR_TAG, body["error"], synchronous=True)
            self._failed.add(run_id)
        elif run_id in self._failed:
            self._client.delete_tag(run_id, ERROR_TAG)
            self._failed.discard(run_id)
        if body["state"] == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        else:
            self._client.set_terminated(run_id, status=body["state"], end_time=body["end_ms"])

    def _register(self, body: dict[str, Any]) -> None:
        """Register a version, unless this model already has one: a lost answer does not mean a lost version.

        Place and run of the model are passed on: MLflow's own code would look them up in the process-wide tracking store. A
        server uses its own store, and links a version of source `models:/ID` to its model.
        """
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException

        name, model_id = body["name"], self._model_id(body["plan"], body["model"])
        location = self._known_models(body["plan"])[body["model"]].location
        try:
            self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._client.create_registered_model(name, description=body.get("about", REGISTERED_NOTE))
        version = self._version(name, model_id)
        if version is None:
            tags = {**body["tags"], MODEL_ID_TAG: model_id}
            server = urlsplit(self.uri or "").scheme in ("http", "https")
            version = self._client.create_model_version(
                name,
                f"models:/{model_id}" if server else location,
                self._run_id(body["plan"], body["run"]),
                tags=tags,
                description=body["note"],
                model_id=model_id,
            )
        self._show_version(model_id, name, str(version.version))
        parent = self._run_id(body["plan"], body.get("parent", body["run"]))
        if model_id not in self._outputs(parent):
            self._client.log_outputs(parent, [LoggedModelOutput(model_id, int(body["tags"]["t"]))])
        if "alias" in body:  # a row of an earlier release
            self._alias(body)

    def _alias(self, body: dict[str, Any]) -> None:
        from mlflow.exceptions import MlflowException

        if body["model"] is None:
            try:
                return self._client.delete_registered_model_alias(body["name"], body["alias"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None  # the registered model was deleted, and its aliases with it
        name, model_id = body["name"], self._model_id(body["plan"], body["model"])
        version = self._version(name, model_id)
        if version is None:
            raise Refused(f"{name} has no version of {body['model']!r} for the alias {body['alias']!r}")
        self._client.set_registered_model_alias(name, body["alias"], version.version)

    def _version(self, name: str, model_id: str) -> Any:
        """The version of a registered model that is this model, or None."""
        quoted = name.replace("'", "''")
        versions = pages(
            lambda _, **query: self._client.search_model_versions(**query), [], f"name='{quoted}'"
        )
        return next((v for v in versions if v.tags.get(MODEL_ID_TAG) == model_id), None)

    def _show_version(self, model_id: str, name: str, version: str) -> None:
        """Show the version on the model's own page, which reads a tag that servers and `mlflow.register_model` set, but sqlite
        does not.
        """
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

        shown = json.loads(self._client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS) or "[]")
        if not any(one["name"] == name and str(one["version"]) == version for one in shown):
            tag = {MLFLOW_MODEL_VERSIONS: json.dumps([*shown, {"name": name, "version": version}])}
            self._client.set_logged_model_tags(model_id, tag)

    # --- what the server has ----------------------------------------------------------------------------------------

    def _known_runs(self, plan: str) -> dict[str, str]:
        if plan not in self._runs:
            found = pages(self._client.search_runs, [self._experiment_id], f"tags.`{PLAN_TAG}` = '{plan}'")
            ours = [run for run in found if run.data.tags.get(PLAN_TAG) == plan and RUN_TAG in run.data.tags]
            # The oldest wins if a second one was made by hand.
            ours.sort(key=lambda run: (run.info.start_time, run.info.run_id), reverse=True)
            self._runs[plan] = {run.data.tags[RUN_TAG]: run.info.run_id for run in ours}
            self._failed.update(run.info.run_id for run in ours if ERROR_TAG in run.data.tags)
        return self._runs[plan]

    def _known_models(self, plan: str) -> dict[str, "_Model"]:
        if plan not in self._models:
            found = pages(
                self._client.search_logged_models, [self._experiment_id], f"tags.`{PLAN_TAG}` = '{plan}'"
            )
            ours = [model for model in found if model.tags.get(PLAN_TAG) == plan and MODEL_TAG in model.tags]
            ours.sort(key=lambda model: (model.creation_timestamp, model.model_id), reverse=True)
            self._models[plan] = {
                m.tags[MODEL_TAG]: _Model(
                    m.model_id, m.artifact_location, str(m.status) == "READY", bool(m.tags.get(MISSING_TAG))
                )
                for m in ours
            }
        return self._models[plan]

    def _run_id(self, plan: str, key: str) -> str:
        run_id = self._known_runs(plan).get(key)
        if run_id is None:
            raise Refused(
                f"the MLflow run of {key!r} is gone; restore it in the UI (or delete its whole study there)"
            )
        return run_id

    def _model_id(self, plan: str, key: str) -> str:
        known = self._known_models(plan).get(key)
        if known is None:
            raise Refused(
                f"the MLflow model of {key!r} is gone or was refused; its metrics have nowhere to go"
            )
        return known.model_id

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(items), _BATCH):
            self._client.log_batch(run_id, params=items[start : start + _BATCH], synchronous=True)

    def _model_inputs(self, plan: str, keys: Sequence[str]) -> list[Any]:
        """The models as inputs; a model that does not exist (its row was refused) is left out."""
        from mlflow.entities import LoggedModelInput

        known = self._known_models(plan) if keys else {}
        return [LoggedModelInput(known[key].model_id) for key in keys if key in known]

    def _outputs(self, run_id: str) -> list[str]:
        outputs = self._client.get_run(run_id).outputs
        return [] if outputs is None else [output.model_id for output in outputs.model_outputs]


def _units(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Single rows, except that neighbours which only add to the same run go together: each unit is a request to a server."""

    def key(entry: Entry) -> Any:
        body = entry.payload
        return (body["plan"], body["run"]) if body["op"] == "log" else entry.seq

    for _, unit in groupby(entries, key):
        yield list(unit)


def _merged(bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several rows of op `log` as one; each metric keeps the model of its row."""
    if bodies[0]["op"] != "log":
        return bodies[0]
    metrics = [(*metric, body["model"]) for body in bodies for metric in body["metrics"]]
    tags = {key: value for body in bodies for key, value in body["tags"].items()}
    return {**bodies[0], "metrics": metrics, "tags": tags}


def _dataset_input(dataset: dict[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entity = Dataset(dataset["name"], dataset["digest"], "local", json.dumps({"uri": dataset["name"]}))
    return DatasetInput(entity, [InputTag("mlflow.data.context", dataset["context"])])


def _user_tag() -> dict[str, str]:
    with contextlib.suppress(OSError, KeyError):
        return {"mlflow.user": getpass.getuser()}
    return {}


def _short(error: object) -> str:
    """One line of at most 300 characters, without credentials."""
    return redact(" ".join(str(error)[:4000].split()))[:300]
