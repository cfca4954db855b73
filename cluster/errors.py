"""What can be wrong with a cluster, for everybody who starts, joins or asks one."""


class ClusterError(ValueError):
    """The cluster cannot be reached or must not be used as it is."""

    exit_code = 2


class ClusterLost(Exception):
    """The cluster under a running study is gone, or no longer tells what becomes of a job."""
