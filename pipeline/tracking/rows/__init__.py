"""Rows for the tracker: a pure projection of plan and records, without MLflow and without a clock."""
