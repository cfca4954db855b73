"""The MLflow experiment whose runs are studies: found by its name, or created.

Invariant: two processes that create it at the same time use the same one; tags that a person has set stay.
"""

from typing import Any

from pipeline.errors import TrackingError

TAGS = {
    # Without it the UI opens in its GenAI view, where models are called agent versions.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Temporal model merging: one run per study; unfold it for its trajectories and experts.",
    "mlflow.experiment.primaryMetric.name": "gm",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}


def find_or_make(client: Any, name: str, location: str | None) -> tuple[str, str]:
    """The experiment's id and artifact location; a new one has `location` (None: the server's choice). Raises TrackingError."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            made = str(client.create_experiment(name, location, tags=TAGS))
            return made, str(client.get_experiment(made).artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted; restore it, or set tracking.experiment"
        )
    for key, value in TAGS.items():
        if key not in found.tags:
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id), str(found.artifact_location)
