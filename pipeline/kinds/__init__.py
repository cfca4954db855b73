"""Kinds of steps: what bears on the result of each, what the result is, and what the rest of the pipeline must know of it.

Used from outside: `table` (`KINDS`, one row per kind), `specs` (`TrainSpec`, `MergeSpec`, `EvaluateSpec`), `results`.
"""
