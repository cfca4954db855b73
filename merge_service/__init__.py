"""Merging without Ray, MLflow or torch at import: checkpoints, techniques, the engine, timelines and the merge service."""

from merge_service.moved import lead

lead()
