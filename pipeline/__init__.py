"""What to do, and the memory of it: studies, plans, the store, tracking, runs, reports, the command line and the Python API."""

from merge_service.moved import lead

lead()
