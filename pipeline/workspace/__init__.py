"""OUT: a study with its plan, its store, the lock of its driver, and the registrations of studies that use the store.

Used from outside: `workspace` (`Workspace`), `opening` (`open_plan`, `open_store`), `lock` (`driver_lock`,
`read_driver`), `registrations` (which studies use a store), `gc` (`collect`).
"""

from merge_service.moved import names_from

__getattr__ = names_from("pipeline.workspace.workspace", "pipeline.workspace.opening")
