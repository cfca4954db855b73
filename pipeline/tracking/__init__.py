"""Tracking in MLflow: rows wait in an outbox and are delivered in the background, each exactly once.

A study never waits for MLflow. Used from outside: `session` (`Tracking`), `tracker` (`sync`, `ui_command`, `ui_url`,
`file_with_study`), `outbox` (`glance`), `mlflow.ui_server` (`serve`).

Invariant: only `mlflow/` imports MLflow.
"""

from merge_service.moved import names_from

__getattr__ = names_from(
    "pipeline.tracking.tracker", "pipeline.tracking.session", "pipeline.tracking.mlflow.ui"
)
