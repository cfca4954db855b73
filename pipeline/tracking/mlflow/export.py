"""The content of a tracking store for an experiment, in one canonical form; tests use it to show that nothing is lost or
duplicated.

Invariant: two stores with the same content export the same value. Ids, times, places and measured durations are left out; the
number of times a metric was logged is not, so a duplicate shows.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import TrackingError
from pipeline.tracking.mlflow.client import pages
from pipeline.tracking.mlflow.local import guard_environment
from pipeline.tracking.mlflow.sink import MODEL_ID_TAG, MODEL_TAG, PLAN_TAG, RUN_TAG

SYSTEM = "system/"
"""Prefix of the names of MLflow's system metrics: measurements of the machine, left out."""
GIT_TAGS = frozenset({"mlflow.source.git.commit", "mlflow.git.dirty"})
DURATIONS = frozenset({"merge_seconds", "train_seconds", "samples_per_second"})
_VOLATILE_TAGS = frozenset(
    {"mlflow.user", "mlflow.parentRunId", "mlflow.log-model.history", "code_version", *GIT_TAGS}
)


def export(uri: str, experiment: str, plan: str | None = None) -> list[dict[str, Any]]:
    """All runs, models and registered versions of models of an experiment (of one plan if given), sorted.

    A run: {"run", "name", "parent", "status", "params", "tags", "metrics": [[key, step, value], ...], "artifacts", "inputs",
    "outputs", "datasets"}; a model: {"model", "name", "type", "run", "status", "params", "tags", "metrics", "artifacts"}; a
    version: {"registered", "name", "version", "of", "aliases", "tags"}. Raises TrackingError if there is no such experiment.
    """
    guard_environment()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise TrackingError(f"there is no MLflow experiment {experiment!r}")
    query = None if plan is None else f"tags.`{PLAN_TAG}` = '{plan}'"
    runs = list(pages(client.search_runs, [found.experiment_id], query))
    models = list(pages(client.search_logged_models, [found.experiment_id], query))
    run_keys = {run.info.run_id: _run_key(run) for run in runs}
    model_keys = {model.model_id: model.tags.get(MODEL_TAG, model.name) for model in models}
    exported_runs = [_run(client, run, run_keys, model_keys) for run in runs]
    exported_models = [_model(client, model, run_keys) for model in models]
    return [
        *sorted(exported_runs, key=lambda item: (item["run"], str(item))),
        *sorted(exported_models, key=lambda item: (item["model"], str(item))),
        *_versions(client, model_keys),
    ]


def _versions(client: Any, model_keys: Mapping[str, str]) -> list[dict[str, Any]]:
    registered = {model.name: model for model in client.search_registered_models()}
    found = [
        {
            "registered": version.name,
            "name": f"{version.name}/{version.version}",
            "version": str(version.version),
            "of": model_keys[version.tags[MODEL_ID_TAG]],
            "aliases": sorted(
                a for a, v in registered[version.name].aliases.items() if str(v) == str(version.version)
            ),
            "tags": {key: value for key, value in _stable(version.tags).items() if key != MODEL_ID_TAG},
        }
        for version in client.search_model_versions()
        if version.tags.get(MODEL_ID_TAG) in model_keys
    ]
    return sorted(found, key=lambda item: (item["registered"], int(item["version"])))


def _run_key(run: Any) -> str:
    return str(run.data.tags.get(RUN_TAG, run.info.run_name))


def _run(client: Any, run: Any, run_keys: Mapping[str, str], model_keys: Mapping[str, str]) -> dict[str, Any]:
    history = [
        [point.key, point.step, None if point.key in DURATIONS else point.value]
        for key in run.data.metrics
        if not key.startswith(SYSTEM)
        for point in client.get_metric_history(run.info.run_id, key)
    ]
    outputs = [] if run.outputs is None else run.outputs.model_outputs
    inputs = client.get_run(run.info.run_id).inputs.model_inputs  # a search leaves them out
    datasets = [] if run.inputs is None else run.inputs.dataset_inputs
    return {
        "run": _run_key(run),
        "name": run.info.run_name,
        "parent": run_keys.get(run.data.tags.get("mlflow.parentRunId", "")),
        "status": run.info.status,
        "params": dict(sorted(run.data.params.items())),
        "tags": _stable(run.data.tags),
        "metrics": sorted(history, key=str),
        "artifacts": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        "inputs": sorted(str(model_keys.get(one.model_id)) for one in inputs),
        "outputs": sorted(str(model_keys.get(output.model_id)) for output in outputs),
        "datasets": sorted(f"{item.dataset.name}:{item.dataset.digest}" for item in datasets),
    }


def _model(client: Any, model: Any, run_keys: Mapping[str, str]) -> dict[str, Any]:
    metrics = [
        [
            metric.key,
            metric.step,
            None if metric.key in DURATIONS else metric.value,
            metric.dataset_name,
            run_keys.get(metric.run_id, ""),
        ]
        for metric in model.metrics or []
    ]
    return {
        "model": model.tags.get(MODEL_TAG, model.name),
        "name": model.name,
        "type": model.model_type,
        "run": run_keys.get(model.source_run_id),
        "status": str(model.status),
        "params": dict(sorted((model.params or {}).items())),
        "tags": _stable(model.tags),
        "metrics": sorted(metrics, key=str),
        "artifacts": sorted(item.path for item in client.list_logged_model_artifacts(model.model_id)),
    }


def _stable(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in sorted(tags.items()) if key not in _VOLATILE_TAGS}
