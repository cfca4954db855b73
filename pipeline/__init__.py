"""Studies: configuration, plans, the store, tracking, runs, reports, the command line and the Python API."""

from merge_service.moved import lead

lead()
