"""Adapters as results: of merges of adapters, exactly where the technique is linear, and of the difference of two models.

Used from outside: `extract`, `concatenate`, `LINEAR`, `Written`.
"""
