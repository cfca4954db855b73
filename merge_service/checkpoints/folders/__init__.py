"""Directories that a library opens as a model: which file holds the weights, and which files belong beside them.

Used from outside: `Folder`, `STANDARD`.
"""
