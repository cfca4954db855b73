"""Adapters as weights: base + s * B A, made block of rows by block of rows, so that a merge takes them like any other model.

Used from outside: `open_weights`, `parts_of`, `Reference`, `write_adapted`, `on_grid`.
"""
