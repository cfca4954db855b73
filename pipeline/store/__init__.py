"""Artifacts by fingerprint: committed whole or not at all, checked on every read, on a file system or in a bucket.

Used from outside: `open` (`store_at`), `local` (`Store`: has, record, staged, commit), `artifact` (`Record`), `lease`
(which driver carries out which step), `upkeep` (what gc needs), `versions` (library versions that made the artifacts).
"""

from merge_service.moved import names_from

__getattr__ = names_from("pipeline.store.local")
