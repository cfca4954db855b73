"""MLflow, never in the way of a study: rows wait in an outbox and are delivered in the background, each exactly once.

Used from outside: `session` (`Tracking`), `tracker` (`sync`, `ui_command`, `ui_url`, `file_with_study`), `outbox` (`glance`),
`mlflow.ui_server` (`serve`). Only `mlflow/` imports MLflow.
"""
