"""The display of a running study."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.plan.steps import Plan
from pipeline.run.progress import (
    NOTES,
    SHOWN,
    Moment,
    Progress,
    Standings,
    Tell,
    clock,
    read_progress,
    training_columns,
    view,
)
from pipeline.run.timing.pace import Pace, duration, learn
from tests.pipeline.plan_toys import facts, make_plan, study


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def plan_of(strategies: list[str], **changes: object) -> Plan:
    return make_plan(study(strategies, **changes), facts())


def progress_of(
    plan: Plan, scratch: Path, console: Console, standings: Standings | None = None, tell: Tell | None = None
) -> Progress:
    """The progress of a plan whose first step is done."""
    return Progress(
        Pace(plan.steps), {next(iter(plan.steps))}, scratch, standings or Standings(plan), console, tell
    )


def test_progress_off_a_terminal_is_one_plain_line_per_step(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    plan = plan_of(["zero_shot", "offline_merging"])
    one = next(name for name, step in plan.steps.items() if step.kind == "train")
    with progress_of(plan, tmp_path, console) as progress:
        progress.started(one, "t1 animals: expert from base")
        progress.finished(one, "100 steps, loss 1.5", 20.0)
        progress.started("f2", "t1 animals: average")
        progress.put_back("f2", "WorkerLost: died")
    first, second = lines(console)
    total = len(plan.steps)
    assert first.startswith(f"[2/{total}] t1 animals: expert from base: 100 steps, loss 1.5 (20.0 s), about ")
    assert second == "t1 animals: average: WorkerLost: died; trying again"


def test_progress_on_a_terminal_shows_rates_trajectories_and_counts(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    (tmp_path / "f1").mkdir()
    report = {"step": 50, "steps": 100, "samples": 3200, "rate": 640.0, "loss": 2.25}
    (tmp_path / "f1" / "progress.json").write_text(json.dumps(report))
    plan = plan_of(["best_in_time"])
    standings = Standings(plan)
    scores = dict.fromkeys((*plan.adaptation, *plan.held_out), 0.412)
    standings.scored(plan.trajectories[0].points[2].evaluate, scores)
    with progress_of(plan, tmp_path, console, standings) as progress:
        progress.started("f1", "t3 photos_b: expert from ema")
    shown = "\n".join(lines(console))
    for text in (
        f"1 of {len(plan.steps)} steps done",
        "time left not known yet",
        "t3 photos_b: expert from ema",
        "50/100",
        "640 samples/s",
        "5 s",
        "2.250",
        "best_in_time",
        "2/3",
        "0.412",
    ):
        assert text in shown


class Screen:
    """Progress on a terminal, and the content of its next drawing."""

    def __init__(self, scratch: Path, plan: Plan) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        self.progress = progress_of(plan, scratch, console)

    def shown(self) -> str:
        paper = Console(file=io.StringIO(), width=120)
        paper.print(view(self.progress.moment()))
        return "\n".join(lines(paper))


def test_note_leaves_the_live_view_when_it_is_no_longer_true(tmp_path: Path) -> None:
    screen = Screen(tmp_path, plan_of(["best_in_time"]))
    with screen.progress as progress:
        progress.note("worker-1 has not begun after 15 s", about="worker-1")
        progress.note("waiting 30 s for nodes to come back", about="nodes")
        progress.started("f1", "t1 animals: average")
        progress.put_back("f1", "WorkerLost: died (try 1 of 3)")
        for text in ("worker-1 has not begun", "waiting 30 s", "died (try 1 of 3); trying again"):
            assert text in screen.shown()
        progress.settled("worker-1")
        assert "worker-1" not in screen.shown() and "waiting 30 s" in screen.shown()
        progress.settled("nodes")
        progress.started("f1", "t1 animals: average")
        assert "try 1 of 3" in screen.shown(), "it is still that try"
        progress.finished("f1", "merged")
        assert "try 1 of 3" not in screen.shown()


def test_newer_note_about_the_same_replaces_the_older_and_only_the_newest_are_shown(tmp_path: Path) -> None:
    screen = Screen(tmp_path, plan_of(["best_in_time"]))
    with screen.progress as progress:
        for number in range(NOTES + 3):
            progress.note(f"note {number} about one thing", about="one")
            progress.note(f"note {number} about itself", about=str(number))
    shown = screen.shown()
    assert shown.count("about one thing") == 1 and f"note {NOTES + 2} about one thing" in shown
    assert shown.count("about itself") == NOTES - 1 and "note 0 " not in shown


def test_standings_show_the_trajectories_scored_last_and_count_the_others() -> None:
    seeds = list(range(SHOWN + 5))
    plan = plan_of(["continual_finetuning"], grid={"strategies": ["continual_finetuning"], "seed": seeds})
    standings = Standings(plan)
    assert len(standings.rows()) == SHOWN and standings.hidden == 5
    scores = dict.fromkeys((*plan.adaptation, *plan.held_out), 0.25)
    for trajectory in plan.trajectories[:-1]:
        standings.scored(trajectory.points[1].evaluate, scores)
    standings.scored(plan.trajectories[-1].points[3].evaluate, scores)
    standings.scored(plan.trajectories[-1].points[2].evaluate, scores)
    rows = standings.rows()
    assert [name for name, *_ in rows] == [one.id for one in plan.trajectories[5:]]
    assert rows[-1][1:] == (3, 3, 0.25) and rows[0][1:] == (1, 3, 0.25)


def test_training_columns_estimate_the_time_left_from_what_is_done() -> None:
    report = {"step": 25, "steps": 100, "samples": 200, "rate": 40.0, "loss": 1.0}
    assert training_columns(report) == ("25/100", "40 samples/s", "15 s", "1.000")
    assert training_columns({"step": 0, "steps": 100}) == ("0/100", "", "", "")
    assert training_columns({}) == ("", "", "", "")


def test_read_progress_of_a_half_written_or_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_progress(tmp_path, "nobody") == {}
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "progress.json").write_text('{"step": 1')
    assert read_progress(tmp_path, "f") == {}


# --- how long it takes ------------------------------------------------------------------------------------------------


def of_kind(plan: Plan, kind: str) -> list[str]:
    return [name for name, step in plan.steps.items() if step.kind == kind]


def test_nothing_is_said_of_the_time_left_before_something_was_measured() -> None:
    plan = plan_of(["best_in_time"])
    pace = Pace(plan.steps)
    assert pace.left(set()) is None and pace.share({next(iter(plan.steps))}) == 1 / len(plan.steps)
    assert clock(Moment(0, 3, 12.0)) == "12 s, time left not known yet"


def test_time_left_is_that_of_the_longest_chain_or_of_all_work_over_the_workers() -> None:
    """Experts of the base may train side by side; those of a chain may not."""
    side_by_side, chain = (
        Pace(plan_of(["offline_merging"]).steps),
        Pace(plan_of(["continual_finetuning"]).steps),
    )
    for pace, kinds in (
        (side_by_side, {"train": 100.0, "merge": 1.0, "evaluate": 10.0}),
        (chain, {"train": 100.0, "evaluate": 10.0}),
    ):
        for kind, seconds in kinds.items():
            pace.took(next(name for name, step in pace._steps.items() if step.kind == kind), seconds)
        pace.at_once(["train"] * 3)
    plan = plan_of(["offline_merging"])
    trained, scored = len(of_kind(plan, "train")), len(of_kind(plan, "evaluate"))
    assert side_by_side.left(set()) == max((100 * trained + 10 * scored) / 3, 100 + 1 + 10)
    plan = plan_of(["continual_finetuning"])
    assert chain.left(set()) == 100 * len(of_kind(plan, "train")) + 10
    first = of_kind(plan, "train")[0]
    assert chain.left({first}) == 100 * (len(of_kind(plan, "train")) - 1) + 10
    assert chain.left(set(), {first: 60.0}) == 100 * len(of_kind(plan, "train")) + 10 - 60
    assert chain.left(set(plan.steps)) == 0.0


def test_kinds_that_have_not_run_yet_are_reckoned_by_their_rough_weight() -> None:
    plan = plan_of(["best_in_time"])
    pace = Pace(plan.steps)
    pace.took(of_kind(plan, "train")[0], 100.0)
    merge, score = (pace.seconds(of_kind(plan, kind)[0]) for kind in ("merge", "evaluate"))
    assert (merge, score) == (1.0, 3.0)


def test_pace_is_learnt_from_the_times_at_which_workers_were_at_a_step() -> None:
    plan = plan_of(["offline_merging"])
    one, other = of_kind(plan, "train")[:2]
    pace = Pace(plan.steps)
    line = {"kind": "train", "end": 130.0}
    learn(
        pace,
        [
            {"event": "start", "time": 0.0},
            {**line, "fingerprint": one, "start": 100.0},
            {**line, "fingerprint": other, "start": 120.0},
        ],
    )
    assert pace.seconds(one) == 20.0 and pace.width == {True: 1, False: 2}
    learn(pace, [{**line, "fingerprint": "of another plan", "start": 0.0}])
    assert pace.seconds(one) == 20.0


def test_durations_are_said_in_units_that_fit() -> None:
    said = [duration(seconds) for seconds in (0.4, 89, 90, 3600, 8000, 2 * 86400, 3 * 86400 + 7200)]
    assert said == ["0 s", "89 s", "2 min", "1 h", "2 h 13 min", "2 days", "3 days 2 h"]


def test_callback_is_given_moments_and_one_that_fails_is_left_out(tmp_path: Path) -> None:
    plan, console, seen = plan_of(["best_in_time"]), Console(file=io.StringIO()), list[Moment]()

    def tell(moment: Moment) -> None:
        seen.append(moment)
        if moment.done == 2:
            raise ValueError("mine")

    one = of_kind(plan, "train")[0]
    with progress_of(plan, tmp_path, console, tell=tell) as progress:
        progress._drawn = -1e9
        progress.started(one, "expert")
        progress._drawn = -1e9
        progress.put_back("f2", "WorkerLost: died", "lost")
        progress._drawn = -1e9
        progress.finished(one, "done", 5.0)
        progress._drawn = -1e9
        progress.note("on it goes")
    assert [(moment.done, moment.troubles) for moment in seen] == [
        (1, {}),
        (1, {"lost": 1}),
        (2, {"lost": 1}),
    ]
    assert seen[0].running[0][0] == "expert" and seen[0].total == len(plan.steps)
    said = lines(console)
    assert len(said) == 2 and "is not called again (ValueError: mine)" in said[0] and said[1] == "on it goes"


def test_losses_and_retries_are_counted_to_the_end(tmp_path: Path) -> None:
    screen = Screen(tmp_path, plan_of(["best_in_time"]))
    with screen.progress as progress:
        for kind in ("retry", "retry", "lost"):
            progress.started("f1", "t1 animals: average")
            progress.put_back("f1", "died", kind)
        assert "2 steps tried again, 1 step begun again after" in screen.shown()


def test_time_left_is_reckoned_now_and_then_and_runs_down_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, now, asked = plan_of(["best_in_time"]), [100.0], list[int]()
    progress = progress_of(plan, tmp_path, Console(file=io.StringIO()))
    monkeypatch.setattr(progress, "_now", lambda: now[0])
    monkeypatch.setattr(progress.pace, "left", lambda *_: (asked.append(1), 50.0)[1])
    progress.pace.took(of_kind(plan, "train")[0], 10.0)
    assert progress.moment().remaining == 50.0
    now[0] += 1.5
    assert progress.moment().remaining == 48.5 and len(asked) == 1
    now[0] += 1.0
    assert progress.moment().remaining == 50.0 and len(asked) == 2
