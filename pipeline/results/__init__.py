"""Scores over time: KA, ZS and GM of every trajectory at every t, from the records in the store."""

from merge_service.moved import names_from
from pipeline.results.over_time import (
    backward_transfer,
    forgetting,
    gm,
    ka,
    results,
    summary,
    table,
    winner,
    write_results,
    zs,
)

__all__ = [
    "backward_transfer",
    "forgetting",
    "gm",
    "ka",
    "results",
    "summary",
    "table",
    "winner",
    "write_results",
    "zs",
]

__getattr__ = names_from("pipeline.results.over_time")
