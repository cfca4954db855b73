"""Errors of starting, joining and querying a cluster."""


class ClusterError(ValueError):
    """The cluster cannot be started or reached, or cannot be used as configured."""

    exit_code = 2


class ClusterLost(Exception):
    """The cluster of a running study is gone, or no longer reports the state of a job."""
