"""Delivers outbox rows to MLflow, so that delivering a row again changes nothing.

Invariant: every run and model is found again by our own tags before it is made, every metric has the timestamp of its
record, and no request is retried below us: after any failure we look first at what the server has (a lost answer is
not a lost request). What the server answers is input, not truth: runs without our tags are ignored, no redirect is
followed, and a server cannot make us write a file on this machine.

Weights are linked, not copied, when MLflow's artifacts lie on the store's own file system (the default): logging every
merged checkpoint then costs no disk. Nothing is pickled; a model is the files open_clip opens plus `manifest.json`.
"""

import contextlib
import getpass
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import CorruptArtifact, StoreError, TrackingError
from pipeline.study.addresses import redact
from pipeline.tracking.mlflow.client import Limit, PatientClient, pages
from pipeline.tracking.mlflow.local import (
    LOCAL_ARTIFACTS,
    follow_home,
    guard_environment,
    local_uri,
    make_local_store,
    place,
)
from pipeline.tracking.outbox import Entry
from pipeline.workspace.opening import store_of

PLAN_TAG = "temporal_merge.plan"
RUN_TAG = "temporal_merge.run_key"
MODEL_TAG = "temporal_merge.model_key"
MODEL_ID_TAG = "temporal_merge.model_id"
MISSING_TAG = "temporal_merge.weights_missing"
ERROR_TAG = "error"
MANIFEST = "manifest.json"
REGISTERED_NOTE = "What the best trajectory of a study serves at its last t, study after study; see the tags of each version."

_BATCH = 90
_REFUSALS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE", "RESOURCE_CONFLICT"}
)
# A registry that is not there, or not ours to write, must not hold up what comes after.
_REGISTRY = frozenset({"register", "alias"})
_NO_REGISTRY = frozenset({"PERMISSION_DENIED", "FEATURE_DISABLED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"})
_REMOTE_SCHEMES = frozenset(
    {"s3", "gs", "abfs", "abfss", "wasb", "wasbs", "hdfs", "viewfs", "dbfs", "oss", "r2", "b2"}
)


class Refused(TrackingError):
    """The tracker will not take this row, however often it is offered; the rows behind it may still pass."""


@dataclass(frozen=True)
class _Model:
    model_id: str
    location: str
    ready: bool


class MlflowSink:
    """One tracking store, one experiment. Used by one thread.

    `uri` None means sqlite in `out` with artifacts beside it; anything else is an MLflow tracking URI.
    """

    def __init__(self, out: Path, uri: str | None, experiment: str, limit: Limit | None = None) -> None:
        self.out = out.resolve()
        self.uri = uri
        self.experiment = experiment
        self._limit = limit or Limit()
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
        """Open the store, make the experiment if need be. Slow the first time (imports, database migrations)."""
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
        self._experiment_id = self._find_or_make_experiment(client)
        self._client = client

    def forget(self) -> None:
        """After a failure: trust nothing remembered, look everything up again."""
        self._client = None
        self._runs.clear()
        self._failed.clear()
        self._models.clear()

    def deliver(self, entry: Entry) -> None:
        """Send one row. Raises Refused when it can never pass, TrackingError when it may later."""
        from mlflow.exceptions import MlflowException

        try:
            self.connect()
            self._operations[entry.payload["op"]](entry.payload)
        except TrackingError:
            raise
        except MlflowException as error:
            refused = _REFUSALS | (_NO_REGISTRY if entry.payload["op"] in _REGISTRY else frozenset())
            kind = Refused if error.error_code in refused else TrackingError
            raise kind(f"{entry.key}: {error.error_code}: {_short(error)}") from error
        except Exception as error:  # a hostile answer can fail anywhere inside the client
            raise TrackingError(f"{entry.key}: {type(error).__name__}: {_short(error)}") from error

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
        model_id = None if body["model"] is None else self._model_id(body["plan"], body["model"])
        metrics = [
            Metric(key, value, stamp, step, model_id=model_id, dataset_name=dataset, dataset_digest=digest)
            for key, value, step, stamp, dataset, digest in body["metrics"]
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
        if not known.ready:
            self._upload_model(known, body)
            self._client.finalize_logged_model(known.model_id, "READY")
            self._models[plan][key] = replace(known, ready=True)
        if made_now or known.model_id not in self._outputs(run_id):
            self._client.log_outputs(run_id, [LoggedModelOutput(known.model_id, body["step"])])

    def _artifact(self, body: dict[str, Any]) -> None:
        run_id = self._run_id(body["plan"], body["run"])
        target = self._artifact_target(self._client.get_run(run_id).info.artifact_uri)
        with tempfile.TemporaryDirectory(prefix="temporal-merge-") as scratch:
            source = Path(scratch) / _safe_name(body["name"])
            if body["text"] is None:
                shutil.copyfile(self._inside(body["path"]), source)
            else:
                source.write_text(body["text"], encoding="utf-8")
            if target is None:
                self._client.log_artifact(run_id, str(source))
            else:
                place(source, target / source.name)

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
        """The version of this very model is looked for first: a lost answer is not a lost version.

        Place and run of the model are told: MLflow's sqlite registry would look them up in the process-wide tracking store.
        """
        from mlflow.exceptions import MlflowException

        name, model_id = body["name"], self._model_id(body["plan"], body["model"])
        location = self._known_models(body["plan"])[body["model"]].location
        try:
            self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._client.create_registered_model(name, description=REGISTERED_NOTE)
        version = self._version(name, model_id)
        if version is None:
            tags = {**body["tags"], MODEL_ID_TAG: model_id}
            version = self._client.create_model_version(
                name,
                location,
                self._run_id(body["plan"], body["run"]),
                tags=tags,
                description=body["note"],
                model_id=model_id,
            )
        self._show_version(model_id, name, str(version.version))
        if "alias" in body:  # a row that an earlier release wrote
            self._alias(body)

    def _alias(self, body: dict[str, Any]) -> None:
        name, model_id = body["name"], self._model_id(body["plan"], body["model"])
        version = self._version(name, model_id)
        if version is None:
            raise Refused(f"{name} has no version of {body['model']!r} for the alias {body['alias']!r}")
        self._client.set_registered_model_alias(name, body["alias"], version.version)

    def _version(self, name: str, model_id: str) -> Any:
        """The version of a registered model that is this very model, or None."""
        quoted = name.replace("'", "''")
        versions = pages(
            lambda _, **query: self._client.search_model_versions(**query), [], f"name='{quoted}'"
        )
        return next((v for v in versions if v.tags.get(MODEL_ID_TAG) == model_id), None)

    def _show_version(self, model_id: str, name: str, version: str) -> None:
        """On the model's own page, which reads a tag that servers and `mlflow.register_model` keep, but sqlite does not."""
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
            # The oldest wins, should a second one ever have been made by hand.
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
                m.tags[MODEL_TAG]: _Model(m.model_id, m.artifact_location, str(m.status) == "READY")
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

    def _find_or_make_experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            location = (self.out / LOCAL_ARTIFACTS).as_uri() if self.uri is None else None
            try:
                return str(client.create_experiment(self.experiment, location, tags=_EXPERIMENT_TAGS))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self.experiment)
        if found is None or found.lifecycle_stage != "active":
            raise TrackingError(
                f"the MLflow experiment {self.experiment!r} was deleted; restore it, or set tracking.experiment"
            )
        for key, value in _EXPERIMENT_TAGS.items():
            if key not in found.tags:
                client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(items), _BATCH):
            self._client.log_batch(run_id, params=items[start : start + _BATCH], synchronous=True)

    def _outputs(self, run_id: str) -> list[str]:
        outputs = self._client.get_run(run_id).outputs
        return [] if outputs is None else [output.model_id for output in outputs.model_outputs]

    def _upload_model(self, model: "_Model", body: dict[str, Any]) -> None:
        target = self._artifact_target(model.location)
        directory = self._directory(body)
        sources = [directory / _safe_name(name) for name in body["files"]]
        missing = [source.name for source in sources if not source.is_file()]
        if missing:
            self._client.set_logged_model_tags(
                model.model_id, {MISSING_TAG: f"{', '.join(missing)} left the store"}
            )
        with tempfile.TemporaryDirectory(prefix="temporal-merge-") as scratch:
            manifest = Path(scratch) / MANIFEST
            manifest.write_text(
                json.dumps(body["manifest"], indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )
            for source in [manifest, *(source for source in sources if source.is_file())]:
                if target is None:
                    self._client.log_model_artifact(model.model_id, str(source))
                else:
                    place(source, target / source.name)

    def _artifact_target(self, location: str) -> Path | None:
        """The local directory MLflow keeps these artifacts in, or None when they are to be uploaded.

        Raises TrackingError when a server points at this machine's disk or sends us to another host.
        """
        parts = urlsplit(location)
        server = urlsplit(self.uri or "")
        if parts.scheme in ("", "file"):
            path = Path(unquote(parts.path) if parts.scheme else location)
            if server.scheme in ("http", "https"):
                raise TrackingError(
                    f"the tracking server wants artifacts written to the local path {_short(location)}, which is"
                    " refused; start it with --serve-artifacts or with an object store as --artifacts-destination"
                )
            home = self.out / LOCAL_ARTIFACTS
            if self.uri is None and not path.resolve().is_relative_to(home):
                raise TrackingError(f"{path} is not inside {home}, where this study keeps its artifacts")
            return path
        same_host = not parts.netloc or parts.netloc == server.netloc
        if parts.scheme in _REMOTE_SCHEMES or (
            parts.scheme in ("mlflow-artifacts", "http", "https") and same_host
        ):
            return None
        raise TrackingError(f"the tracking server sends artifacts to {_short(location)}, which is refused")

    def _directory(self, body: dict[str, Any]) -> Path:
        """Where the files of a row are: in OUT, or opened in the study's store elsewhere by their fingerprint."""
        if not body["files"] or body["store"].startswith("store/"):
            return self._inside(body["store"])
        store = store_of(self.out)
        try:
            record = store.find(body["manifest"]["fingerprint"])
            return self.out / "gone" if record is None else store.open_verified(record)
        except CorruptArtifact:
            return self.out / "gone"
        except StoreError as error:
            raise TrackingError(str(error)) from error

    def _inside(self, relative: str) -> Path:
        path = (self.out / relative).resolve()
        if not path.is_relative_to(self.out):
            raise Refused(f"{relative!r} lies outside the study's directory")
        return path


_EXPERIMENT_TAGS = {
    # Without it the UI opens in its GenAI view, where models are called agent versions.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Temporal model merging: one run per study; unfold it for its trajectories and experts.",
    "mlflow.experiment.primaryMetric.name": "gm",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}


def _dataset_input(dataset: dict[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entity = Dataset(dataset["name"], dataset["digest"], "local", json.dumps({"uri": dataset["name"]}))
    return DatasetInput(entity, [InputTag("mlflow.data.context", dataset["context"])])


def _user_tag() -> dict[str, str]:
    with contextlib.suppress(OSError, KeyError):
        return {"mlflow.user": getpass.getuser()}
    return {}


def _safe_name(name: str) -> str:
    """A plain file name of ours. Raises Refused on anything that could leave its directory."""
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or name.startswith("."):
        raise Refused(f"{name!r} is no artifact name: letters, digits, dot, dash and underscore only")
    return name


def _short(error: object) -> str:
    """One line of at most 300 characters, without credentials."""
    return redact(" ".join(str(error)[:4000].split()))[:300]
