"""Weights that are seen differently from how they are stored: some of the tensors, other names, another dtype.

Used from outside: `View`, `WRITTEN` and `Cast`.
"""
