"""Remarks: sentences of a person whose numbers are looked up, so that no number on the page was typed.

In a remark, braces hold one of

- a comparison, `{C1.gm}`, with `.low`, `.high` for the ends of its 95 % interval
- scores of a study, `{cells latest/latest zs}`: study, strategy (init/deploy), metric, and where needed `column=value` words that
  select rows; the value is the mean over replicates, or with `min` or `max` as the last word the least or largest replicate

A format may follow a colon: `{...:.0%}`.

Invariant: a name that finds nothing, or several trajectories of one replicate, is an error.
"""

import re
from collections.abc import Sequence
from typing import Any

from merge_service.errors import UserError
from pipeline.claims.contrasts import AVERAGED
from pipeline.claims.judge import Judged
from pipeline.claims.results import CELL, METRICS, STREAM, Findings

_NUMBER = re.compile(r"\{([^{}:]+)(?::([^{}]+))?\}")
_PART = re.compile(r"(C\d+)\.(\w+)(?:\.(low|high))?")
_SCORES = re.compile(
    r"(?P<study>\w+) (?P<init>\w+)/(?P<deploy>\w+) (?P<metric>\w+)(?P<pairs>( \w+=\S+)*)( (?P<pick>min|max))?"
)
TYPED = re.compile(r"\d*\.\d+|\d+ ?%")
"""Numbers that must not be typed: a fraction or a percentage."""


def filled(text: str, found: Findings, judged: Sequence[Judged]) -> str:
    """The remark with its numbers. Raises UserError for a name that cannot be looked up, and for a number that was typed."""
    if typed := TYPED.search(_NUMBER.sub("", text)):
        raise UserError(
            f"a remark has the number {typed.group()} typed in; name where it comes from: {text.strip()[:80]}"
        )
    return _NUMBER.sub(lambda match: _shown(quantity(match[1].strip(), found, judged), match[2]), text)


def quantity(name: str, found: Findings, judged: Sequence[Judged]) -> float:
    """The number that a name in a remark stands for."""
    if match := _PART.fullmatch(name):
        return _of_part(match, judged)
    match = _SCORES.fullmatch(name)
    if not match or match["metric"] not in (*METRICS, *STREAM):
        raise UserError(f"a remark asks for {name!r}, which is neither a comparison nor scores of a study")
    study, metric, pick = match["study"], match["metric"], match["pick"] or "mean"
    pairs = [word.partition("=") for word in match["pairs"].split()]
    if strange := [column for column, _, _ in pairs if column not in CELL]:
        raise UserError(f"a remark asks for {name!r}; {strange[0]} is none of {', '.join(CELL)}")
    where: dict[str, Any] = {"init": match["init"], "deploy": match["deploy"], **AVERAGED}
    rows = found.final(study)
    for column, _, value in pairs:
        where[column] = _like(rows[column].iloc[0], value)
    return float(getattr(found.metric(study, metric, **where), pick)())


def _of_part(match: re.Match[str], judged: Sequence[Judged]) -> float:
    number, key, end = match.groups()
    for one in judged:
        for part in one.claim.parts:
            if (one.claim.number, part.key) == (number, key):
                side = {"low": -1, "high": 1}.get(end or "", 0)
                return part.mean + (side * part.half_width() if side else 0.0)
    raise UserError(f"a remark asks for {match[0]}, and no such comparison is there")


def _like(example: Any, text: str) -> Any:
    """`text` as a value of the column that `example` is from."""
    if isinstance(example, str):
        return text
    return text == "yes" if str(example) in ("True", "False") else float(text)


def _shown(value: float, form: str | None) -> str:
    return (
        format(value, form or ".3f").replace("0.", ".", 1)
        if not (form or "").endswith("%")
        else format(value, form or "")
    )
