"""The live merge service as pure values: entries of the log, the state that they make, gates, removal, and what comes next.

Nothing here reads a file, a clock or a network. `pipeline.service` has the log on disk, the worker, and what people type.
"""

from merge_service.live.decisions import (
    Known,
    Refused,
    arrival_called,
    purge,
    receive,
    reject,
    release,
    remove,
    roll_back,
)
from merge_service.live.entries import (
    DIGITS,
    GENESIS,
    KINDS,
    Admitted,
    BrokenLog,
    ConfigSet,
    Data,
    Draft,
    Entry,
    Evaluated,
    Held,
    Merged,
    Note,
    Promoted,
    Purged,
    Quarantined,
    Received,
    Rejected,
    Removed,
    Replaced,
    RolledBack,
    Scored,
    ServiceStarted,
    TokenIssued,
    TokenRevoked,
    UploadCompleted,
    Verdict,
    Version,
    arrival_id,
    chained,
    entry_of,
    parse,
)
from merge_service.live.gates import (
    Bounds,
    Judged,
    Margins,
    medians,
    merge_gates,
    norms_out_of_bounds,
    outcome,
    solo,
)
from merge_service.live.lineage import (
    RemovalPlan,
    descendants,
    is_snapshot,
    nearest_snapshot,
    parents,
    removal_plan,
)
from merge_service.live.schedule import Task, backlog, next_task
from merge_service.live.state import FINAL, QUEUED, STATUSES, Accepted, Arrival, Served, State, link
from merge_service.live.statistics import Answers, Interval, Paired, bootstrap, mcnemar, score
from merge_service.live.transitions import apply, fold, served_after
from merge_service.live.values import canonical, digest, of_plain, plain

__all__ = [
    "DIGITS", "FINAL", "GENESIS", "KINDS", "QUEUED", "STATUSES", "Accepted", "Admitted", "Answers", "Arrival", "Bounds", "BrokenLog",
    "ConfigSet", "Data", "Draft", "Entry", "Evaluated", "Held", "Interval", "Judged", "Known", "Margins", "Merged", "Note", "Paired",
    "Promoted", "Purged", "Quarantined", "Received", "Refused", "Rejected", "RemovalPlan", "Removed", "Replaced", "RolledBack",
    "Scored", "Served", "ServiceStarted", "State", "Task", "TokenIssued", "TokenRevoked", "UploadCompleted", "Verdict", "Version",
    "apply", "arrival_called", "arrival_id", "backlog", "bootstrap", "canonical", "chained", "descendants", "digest", "entry_of", "fold", "is_snapshot",
    "link", "mcnemar", "medians", "merge_gates", "nearest_snapshot", "next_task", "norms_out_of_bounds", "of_plain", "outcome",
    "parents", "parse", "plain", "purge", "receive", "reject", "release", "removal_plan", "remove", "roll_back", "score",
    "served_after", "solo",
]  # fmt: skip
