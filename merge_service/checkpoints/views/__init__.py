"""Weights that are seen differently from how they are stored (some of the tensors, other names, another dtype), or that are in memory.

Used from outside: `View`, `WRITTEN`, `Cast` and `InMemory`.
"""
