"""A study file, checked: what each key may be, which cells its grid has, in which order its tasks arrive, which data it names.

Used from outside: `config` (`load_study`, `study_from`, `Study`), `sections` (`key_of` and the sections), `grid` (`Cell`), `streams`
(`Stream`, `make_stream`), `suites` (`check`), `addresses` (`redact`), `places` (`expanded`).
"""
