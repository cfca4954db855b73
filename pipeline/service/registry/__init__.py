"""A service in MLflow's model registry: versions and aliases, as the log says."""
