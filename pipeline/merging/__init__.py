"""Merging files and state dicts, here or on workers of a Ray cluster, without a study.

Used from outside: `files` (`merge_files`, `ids_from`), `state_dicts` (`merge_state_dicts`), `split` (`split_over`), `techniques`
(the techniques as plain values).
"""

from merge_service.moved import names_from

__getattr__ = names_from("pipeline.merging.split", "pipeline.merging.files")
