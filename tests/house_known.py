"""Known exceptions to the rules of the house. Entries are only ever removed."""

CIRCLES: dict[str, list[list[str]]] = {}
"""Modules that import each other in a circle, by room."""
STRAY: dict[str, str] = {}
"""Modules that have yet to move into a folder."""
CROWDED: list[str] = []
LONG_LISTS = {
    "cluster": [],
    "pipeline": ["pipeline/api.py:merge"],
    "workers": ["workers/training/batch_norm.py:OverRanks._function"],
}
"""Functions with more parameters than a caller can tell apart. `api.merge` is public and keeps its form."""
VAGUE: list[str] = []
