"""Carrying a plan out: what is ready goes to a free actor, what comes back is in the store, and whoever looks sees how far it is.

Used from outside: `driver` (`carry_out`), `status` (`Look`, `status_of`), `submit` (a study as a job of a cluster), `evaluation`
(`score`), `output` (`steady`), `trace` (what ran where and when), `progress` (tables of a run).
"""
