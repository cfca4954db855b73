"""The study file, checked: the sections and their keys, the cells of the grid, the streams of tasks, and the datasets.

Used from outside: `config` (`load_study`, `study_from`, `Study`), `sections` (`key_of` and the sections), `grid`
(`Cell`), `streams` (`Stream`, `make_stream`), `suites` (`check`), `addresses` (`redact`), `places` (`expanded`).
"""
