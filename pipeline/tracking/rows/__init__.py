"""What the tracker is to know of a study, as plain rows: a pure projection of plan and records, without MLflow and without a clock."""
