"""Checkpoints that torch has pickled, read without unpickling: a machine of our own takes tensors and dictionaries out of them.

Used from outside: `convert`.
"""
