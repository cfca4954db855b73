"""Kinds of steps: the spec of each, the type of its result, and what the rest of the pipeline must know of it.

Used from outside: `table` (`KINDS`, one row per kind), `specs` (`TrainSpec`, `MeasureSpec`, `LearnSpec`, `MergeSpec`, `EvaluateSpec`), `results`.
"""
