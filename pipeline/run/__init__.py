"""Running a plan: ready steps go to free actors, results go to the store, and the state of the run can be watched.

Used from outside: `driver` (`carry_out`), `status` (`Look`, `status_of`), `submit` (a study as a job of a cluster),
`evaluation` (`score`), `output` (`steady`), `trace` (what ran where and when), `progress` (tables of a run).
"""
