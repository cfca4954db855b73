"""The committed page, verdicts and rows agree: every effect, interval and verdict is computed again from the rows by other code.

Nothing of `pipeline.claims` is used but the names of files: rows are read with csv, means and Student's t are taken here, in plain Python and scipy.
"""

import csv
import json
import math
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import fmean, pvariance, quantiles, stdev

import pytest
import yaml
from scipy.stats import spearmanr, ttest_1samp
from scipy.stats import t as student

ROOT = Path(__file__).parents[3]
DATA = ROOT / "docs" / "reproduction"
KEPT = json.loads((DATA / "claims.json").read_text())
PAGE = (ROOT / "docs" / "reproduction.md").read_text()
RIVALS = yaml.safe_load((ROOT / "configs" / "studies" / "time_claims" / "tuned.yaml").read_text())["rivals"]
TECHNIQUE = {one["replay"]: one["technique"] for one in RIVALS}
STRATEGY = {one["replay"]: f"{one['init']}/{one['deploy']}" for one in RIVALS}
HIGH = {"gm", "ka", "zs", "zs_replayed", "zs_never_replayed"}
LINEAR = '{"schedule": "linear"}'
FT, BIT, OFF, ZERO = "latest/latest", "ema/ema", "base/all", "base/base"

Scores = dict[str, float]


@cache
def rows(study: str) -> tuple[dict[str, str], ...]:
    with (DATA / "rows" / f"{study}.csv").open(newline="") as file:
        return tuple(csv.DictReader(file))


def pick(
    study: str, strategy: str, metric: str = "gm", technique: str | None = None, **where: object
) -> Scores:
    """{replicate: score}; averages and what merges nothing unless a technique is named. A test fails where two would be one."""
    answer: Scores = {}
    for row in rows(study):
        named = row["technique"] == technique if technique else row["technique"] in ("average", "-")
        if not named or f"{row['init']}/{row['deploy']}" != strategy:
            continue
        if any(
            row[key] != value if isinstance(value, str) else float(row[key]) != value
            for key, value in where.items()
        ):
            continue
        assert row["replicate"] not in answer, (study, strategy, where)
        answer[row["replicate"]] = float(row[metric] or "nan")
    assert answer, (study, strategy, where)
    return answer


def minus(one: Scores, other: Scores) -> Scores:
    assert one.keys() == other.keys()
    return {name: one[name] - other[name] for name in one}


def less(one: Scores, constant: Scores) -> Scores:
    """Less a number that all replicates of the other have in common."""
    (base,) = set(constant.values())
    return {name: value - base for name, value in one.items()}


def best_technique(study: str, replay: bool, metric: str = "gm") -> Scores:
    where: dict[str, object] = {"replay": str(replay)}
    if TECHNIQUE[replay] == "average":
        where["params"] = "{}"
    return pick(study, OFF, metric, TECHNIQUE[replay], **where)


def techniques() -> dict[str, dict[str, float]]:
    """{replicate: {technique: GM}} offline, without replay, one each."""
    answer: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows("offline"):
        if (row["init"], row["deploy"], row["replay"]) == ("base", "all", "False") and (
            row["technique"] != "average" or row["params"] == "{}"
        ):
            answer[row["replicate"]][row["technique"]] = float(row["gm"])
    return answer


def spread_of(values: list[float]) -> float:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def share(in_time: bool) -> Scores:
    """Share of init x deploy in the variance of GM less all the rest, by the variance of means."""
    tables: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows("cells"):
        if row["technique"] != "-" and (not in_time or row["init"] != "base"):
            tables[row["replicate"]][f"{row['init']}/{row['deploy']}"].append(float(row["gm"]))
    answer = {}
    for name, cells in tables.items():
        everything = [value for values in cells.values() for value in values]
        explained = pvariance([fmean(values) for values in cells.values()]) / pvariance(everything)
        answer[name] = explained - (1 - explained)
    return answer


def ranges(in_time: bool) -> Scores:
    table: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in rows("cells"):
        if row["technique"] != "-" and (not in_time or row["init"] != "base"):
            table[row["replicate"]][(f"{row['init']}/{row['deploy']}", row["technique"])] = float(row["gm"])

    def mean_range(cells: dict[tuple[str, str], float], along: int) -> float:
        lines: dict[str, list[float]] = defaultdict(list)
        for key, value in cells.items():
            lines[key[1 - along]].append(value)
        return fmean(max(values) - min(values) for values in lines.values())

    return {name: mean_range(cells, 0) - mean_range(cells, 1) for name, cells in table.items()}


def at_horizons() -> dict[str, tuple[Scores, Scores]]:
    """{replicate: (GM by strategy at the short, at the long horizon)}."""
    tasks = sorted({int(row["tasks"]) for row in rows("horizons")})
    answer: dict[str, tuple[Scores, Scores]] = defaultdict(lambda: ({}, {}))
    for row in rows("horizons"):
        if (
            row["technique"] in ("average", "-")
            and row["deploy"] != "base"
            and int(row["tasks"]) in (tasks[0], tasks[-1])
        ):
            answer[row["replicate"]][int(row["tasks"]) == tasks[-1]][f"{row['init']}/{row['deploy']}"] = (
                float(row["gm"])
            )
    return answer


GROUPS = ((FT, "latest/ema", "ema/latest", BIT), ("latest/all", "ema/all"), (OFF, "base/ema"))


def tau(groups: tuple[tuple[str, ...], ...]) -> Scores:
    answer = {}
    for name, (short, long) in at_horizons().items():
        pairs = [
            (a, b) for group in groups for a in group for b in group if a < b and a in short and b in short
        ]
        kept = [(short[a] - short[b]) * (long[a] - long[b]) for a, b in pairs]
        answer[name] = (sum(one > 0 for one in kept) - sum(one < 0 for one in kept)) / len(pairs)
    return answer


def of_groups() -> Scores:
    """The expected Spearman correlation if groups keep their places and members are drawn within them."""
    answer = {}
    for name, (short, _) in at_horizons().items():
        sizes = [sum(one in short for one in group) for group in GROUPS]
        n = sum(sizes)
        answer[name] = 1 - sum(size**3 - size for size in sizes) / (n**3 - n)
    return answer


def budget(strategy: str, which: int, metric: str = "gm", study: str = "budgets") -> Scores:
    known = sorted({float(row["multiplier"]) for row in rows("budgets")})
    return pick(study, strategy, metric, multiplier=known[which])


def size(strategy: str, which: int, metric: str = "gm") -> Scores:
    known = list(dict.fromkeys(row["model"] for row in rows("sizes")))
    return pick("sizes", strategy, metric, model=known[which])


def horizon(strategy: str, which: int) -> Scores:
    known = sorted({int(row["tasks"]) for row in rows("horizons")})
    return pick("horizons", strategy, tasks=float(known[which]))


def gap() -> Scores:
    return minus(pick("offline", FT), pick("offline", OFF, replay="False", params="{}"))


def reached(which: int) -> Scores:
    zero = budget(ZERO, 0)
    ours, joint = less(budget(BIT, which), zero), less(budget("joint/joint", which, study="multitask"), zero)
    return {name: ours[name] / joint[name] for name in ours}


def average(metric: str, replay: bool, params: str = "{}") -> Scores:
    return pick("offline", OFF, metric, "average", replay=str(replay), params=params)


def grown(of: str, over: str, metric: str = "gm") -> Scores:
    source = size if over == "size" else budget
    return minus(source(of, -1, metric), source(of, 0, metric))


def half(one: Scores) -> Scores:
    return {name: value / 2 for name, value in one.items()}


def rated(rate: float) -> Scores:
    return minus(pick("learning_rates", FT, lr=rate), pick("learning_rates", OFF, lr=rate))


@cache
def effects(claim: str, key: str) -> Scores:
    """The values of every comparison, by its claim and key."""
    simple = {
        ("C1", "base"): lambda: less(best_technique("cells", True), pick("cells", ZERO)),
        ("C1", "datasets"): lambda: minus(pick("datasets", FT), pick("datasets", OFF)),
        ("C1", "long"): lambda: minus(horizon(FT, -1), horizon(OFF, -1)),
        ("C1", "no_replay"): lambda: minus(pick("no_replay", FT), pick("no_replay", OFF)),
        ("C1", "no_replay_ka"): lambda: minus(pick("no_replay", FT, "ka"), pick("no_replay", OFF, "ka")),
        ("C1", "no_replay_base"): lambda: less(pick("no_replay", FT), pick("no_replay", ZERO)),
        ("C1", "no_replay_best"): lambda: less(best_technique("offline", False), pick("no_replay", ZERO)),
        ("C2", "gain"): lambda: minus(half(gap()), minus(best_technique("offline", False), average("gm", False))),
        ("C2", "spread"): lambda: minus(half(gap()), {name: spread_of(list(found.values())) for name, found in techniques().items()}),
        ("C2", "replay"): lambda: minus(half(minus(pick("cells", FT), pick("cells", OFF))), effects("C2", "replay_gain")),
        ("C2", "replay_gain"): lambda: minus(best_technique("cells", True), pick("cells", OFF)),
        ("C2", "base"): lambda: less(best_technique("offline", False), pick("no_replay", ZERO)),
        ("C2", "average_base"): lambda: less(average("gm", False), pick("no_replay", ZERO)),
        ("C3", "replay"): lambda: minus(average("gm", True), average("gm", False)),
        ("C3", "recency"): lambda: minus(average("gm", False, LINEAR), average("gm", False)),
        ("C3", "gap"): lambda: minus(pick("offline", FT), average("gm", True, LINEAR)),
        ("C3", "recency_replay"): lambda: minus(average("gm", True, LINEAR), average("gm", True)),
        ("C3", "recency_ka"): lambda: minus(average("ka", False, LINEAR), average("ka", False)),
        ("C3", "base"): lambda: less(average("gm", True), pick("cells", ZERO)),
        ("C4", "all"): lambda: share(False),
        ("C4", "in_time"): lambda: share(True),
        ("C4", "range"): lambda: ranges(False),
        ("C4", "range_in_time"): lambda: ranges(True),
        ("C5", "replay"): lambda: minus(pick("cells", BIT), pick("cells", STRATEGY[True])),
        ("C5", "no_replay"): lambda: minus(pick("no_replay", BIT), pick("no_replay", STRATEGY[False])),
        ("C5", "tuned"): lambda: minus(pick("cells", BIT), pick("cells", FT)),
        ("C5", "tuned_no_replay"): lambda: minus(pick("no_replay", BIT), pick("no_replay", FT)),
        ("C5", "offline"): lambda: minus(pick("cells", BIT), best_technique("cells", True)),
        ("C5", "datasets"): lambda: minus(pick("datasets", BIT), pick("datasets", STRATEGY[True])),
        ("C5", "long"): lambda: minus(horizon(BIT, -1), horizon(STRATEGY[True], -1)),
        ("C7", "nearer"): lambda: minus(reached(-1), reached(0)),
        ("C7", "within"): lambda: minus(budget(BIT, -1), budget("joint/joint", -1, study="multitask")),
        ("C7", "base"): lambda: less(budget(BIT, -1), budget(ZERO, 0)),
        ("C8", "order"): lambda: tau(GROUPS),
        ("C8", "leading"): lambda: tau(GROUPS[:1]),
        ("C8", "all"): lambda: {n: spearmanr([a[k] for k in sorted(a)], [b[k] for k in sorted(a)]).statistic for n, (a, b) in at_horizons().items()},
        ("C8", "groups"): of_groups,
        ("C8", "behind"): lambda: minus(horizon(FT, -1), horizon(OFF, -1)),
        ("C8", "more"): lambda: minus(minus(horizon(FT, -1), horizon(OFF, -1)), minus(horizon(FT, 0), horizon(OFF, 0))),
    }  # fmt: skip
    if (claim, key) in simple:
        return simple[(claim, key)]()
    if key.startswith("rate_"):
        return rated(float(key.removeprefix("rate_")))
    head, _, metric = key.partition("_")
    if key in HIGH:
        pair = {
            "C1": lambda: (pick("cells", FT, key), best_technique("cells", True, key)),
            "C3": lambda: (average(key, True), average(key, False)),
            "C5": lambda: (pick("cells", BIT, key), pick("cells", FT, key)),
            "C7": lambda: (budget(BIT, -1, key), budget("joint/joint", -1, key, "multitask")),
        }[claim]  # fmt: skip
        return minus(*pair())
    if claim == "C5" and head == "stream":
        whole = f"stream_{metric or 'gm'}"
        return minus(pick("cells", BIT, whole), pick("cells", FT, whole))
    assert claim == "C6", f"{claim}.{key} is not computed again; write it here"
    rival = {"offline": OFF, "tuned": FT, "base": ZERO}.get(metric)
    return minus(grown(BIT, head), grown(rival, head)) if rival else grown(BIT, head, metric or "gm")


PARTS = {(claim, part["key"]): part for claim, one in KEPT.items() for part in one["parts"]}


@pytest.mark.parametrize(("claim", "key"), PARTS, ids=".".join)
def test_effect_and_interval_follow_from_the_rows(claim: str, key: str) -> None:
    kept, again = PARTS[(claim, key)], effects(claim, key)
    assert again == pytest.approx(kept["values"], abs=1e-12)
    assert kept["effect"] == pytest.approx(fmean(again.values()), abs=1e-12)
    half_width = interval(claim, key)
    assert (
        kept["half_width"] is None
        if half_width is None
        else kept["half_width"] == pytest.approx(half_width, rel=1e-9)
    )


def error(claim: str, key: str) -> float | None:
    """Standard error; of ranks no less than that of rounding to their steps."""
    values = list(effects(claim, key).values())
    spread = stdev(values) if len(values) > 1 else 0.0
    if (claim, key) in (("C8", "order"), ("C8", "leading")):
        groups = GROUPS if key == "order" else GROUPS[:1]
        short = next(iter(at_horizons().values()))[0]
        pairs = sum(math.comb(sum(one in short for one in group), 2) for group in groups)
        spread = max(spread, 2 / pairs / math.sqrt(12))
    return spread / math.sqrt(len(values)) if spread > 1e-12 else None


def interval(claim: str, key: str, alpha: float = 0.05) -> float | None:
    size, width = error(claim, key), len(effects(claim, key))
    return None if size is None else size * float(student.isf(alpha / 2, width - 1))


def says(claim: str, key: str, alpha: float) -> str:
    """The rule as the page states it, at an interval of 1 - alpha."""
    kept, width = PARTS[(claim, key)], interval(claim, key, alpha)
    if width is None:
        return "undecided"
    middle, bar, margin = fmean(effects(claim, key).values()), kept["bar"], kept["margin"]
    low, high = middle - width - bar, middle + width - bar
    if margin and -margin < low and high < margin:
        return "equivalent"
    return "holds" if low > 0 else "refuted" if high < 0 else "undecided"


def least_alpha(claim: str, key: str) -> float:
    """The least alpha at which anything is decided, by halving."""
    if says(claim, key, 1 - 1e-12) == "undecided":
        return 1.0
    low, high = -50.0, 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if says(claim, key, math.exp(middle)) == "undecided" else (low, middle)
    return math.exp(high)


def test_verdicts_follow_from_the_intervals_by_holms_correction() -> None:
    family = sorted(
        (least_alpha(*name), name) for name, part in PARTS.items() if part["bears_on_the_verdict"]
    )
    stopped, largest = False, 0.0
    found: dict[str, list[str]] = defaultdict(list)
    for place, (p, name) in enumerate(family):
        left = len(family) - place
        largest = max(largest, min(1.0, p * left))
        stopped = stopped or p * left > 0.05
        verdict = "undecided" if stopped else says(*name, 0.05 / left)
        assert (name, PARTS[name]["verdict"]) == (name, verdict)
        assert PARTS[name]["p"] == pytest.approx(largest, rel=1e-6, abs=1e-9)
        found[name[0]].append(verdict)
    for claim, verdicts in found.items():
        worst = next(one for one in ("refuted", "equivalent", "undecided", "holds") if one in verdicts)
        assert (claim, KEPT[claim]["verdict"]) == (claim, worst)


def test_interval_of_the_first_part_is_that_of_a_ready_made_t_test() -> None:
    values = list(effects("C1", "gm").values())
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert PARTS[("C1", "gm")]["half_width"] == pytest.approx((high - low) / 2)


def shown(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1)


def test_page_says_what_is_kept() -> None:
    for claim, one in KEPT.items():
        section = PAGE[PAGE.index(f"\n## {claim}\n") :].split("\n## ", 2)[1]
        assert f"**{one['claim']}: {one['verdict']}.**" in section
        lines = {
            line.split(" | ")[0].removeprefix("| "): line
            for line in section.splitlines()
            if line.startswith("| ")
        }
        for part in one["parts"]:
            cells = [cell.strip() for cell in lines[part["says"]].strip("|").split("|")]
            width = "" if part["half_width"] is None else f" ± {shown(part['half_width']).lstrip('+')}"
            assert cells[1] == f"{shown(part['effect'])}{width}"
            assert cells[2] == " ".join(shown(value) for value in part["values"].values())
            assert part["verdict"] in cells[-1] or not part["bears_on_the_verdict"]
        assert re.search(rf"\| \[{claim}\]\(#{claim.lower()}\) \|.*\*\*{one['verdict']}\*\*", PAGE)


def test_readme_counts_the_verdicts_that_are_kept() -> None:
    text = (ROOT / "README.md").read_text()
    sentence = re.search(r"Verdicts by interval .*?\[Does TIME hold here\?\]", text, re.DOTALL)
    assert sentence
    said = {
        word: int(count)
        for word, count in re.findall(r"(holds|refuted|equivalent|undecided) (\d+)", sentence[0])
    }
    kept = [one["verdict"] for one in KEPT.values()]
    assert said == {word: kept.count(word) for word in set(kept)}


def test_advice_says_of_each_claim_the_verdict_that_is_kept() -> None:
    said = re.findall(
        r"\| \[([a-z]+)\]\(reproduction\.md#(c\d)\) \|", (ROOT / "docs" / "choosing.md").read_text()
    )
    assert {claim.upper(): verdict for verdict, claim in said} == {
        claim: one["verdict"] for claim, one in KEPT.items()
    }


def test_numbers_beside_the_figure_of_the_readme_are_those_of_the_rows() -> None:
    rise = re.search(
        r"rise from (\.\d\d) to (\.\d\d), offline merging ends at (\.\d\d)", (ROOT / "README.md").read_text()
    )
    assert rise
    ends = [
        fmean(pick("cells", strategy).values())
        for strategy in (ZERO, FT, "latest/ema", "ema/latest", BIT, OFF)
    ]
    assert rise.groups() == tuple(f"{value:.2f}"[1:] for value in (ends[0], max(ends[1:5]), ends[5]))


def test_nothing_without_replay_ends_a_point_above_the_base() -> None:
    (zero,) = set(pick("no_replay", ZERO).values())
    trained = [row for study in ("no_replay", "offline") for row in rows(study) if row["replay"] == "False"]
    assert len(trained) > 50 and max(float(row["gm"]) for row in trained) < zero + 0.01


@pytest.mark.parametrize(
    ("technique", "key", "says"),
    [
        ("average", "weight", "its best weight was {best} |"),
        ("task_arithmetic", "scale", "on ten tasks was {best}, and {worst} was the worst"),
    ],
)
def test_factors_that_the_advice_names_are_those_of_the_tuning(technique: str, key: str, says: str) -> None:
    scored = {
        json.loads(row["params"])[key]: float(row["gm"])
        for row in rows("tuning")
        if (f"{row['init']}/{row['deploy']}", row["technique"]) == (BIT, technique)
    }
    best, worst = (f"{pick_one(scored, key=scored.get):g}"[1:] for pick_one in (max, min))
    advice = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    assert len(scored) >= 6 and says.format(best=best, worst=worst) in advice


def test_tables_of_the_demo_end_alike_in_the_readme_and_in_the_advice() -> None:
    readme = re.findall(
        r"^\| `([\w-]+)` \|.*\| ([.\d]+ / [.\d]+ / [.\d]+) \|$",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    ends = dict(readme)
    said = re.findall(
        r"^\| `([\w-]+)` \| ([.\d]+) \| ([.\d]+) \| ([.\d]+) \|$",
        (ROOT / "docs" / "choosing.md").read_text(),
        re.MULTILINE,
    )
    assert len(ends) == 7 and len(said) == 6
    assert all(ends[name] == " / ".join(scores) for name, *scores in said)
