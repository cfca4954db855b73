"""What a person sees while a study runs."""

import io
import json
from pathlib import Path

from rich.console import Console

from pipeline.plan.steps import Plan
from pipeline.run.progress import NOTES, SHOWN, Progress, Standings, read_progress, training_columns
from tests.pipeline.plan_toys import facts, make_plan, study


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def plan_of(strategies: list[str], **changes: object) -> Plan:
    return make_plan(study(strategies, **changes), facts())


def test_progress_off_a_terminal_is_one_plain_line_per_step(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with Progress(3, 1, tmp_path, Standings(plan_of(["zero_shot"])), console) as progress:
        progress.started("f1", "t1 animals: expert from base")
        progress.finished("f1", "100 steps, loss 1.5")
        progress.started("f2", "t1 animals: average")
        progress.put_back("f2", "WorkerLost: died")
    first, second = lines(console)
    assert first.startswith("[2/3] t1 animals: expert from base: 100 steps, loss 1.5 (")
    assert second == "t1 animals: average: WorkerLost: died; trying again"


def test_progress_on_a_terminal_shows_rates_trajectories_and_counts(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    (tmp_path / "f1").mkdir()
    report = {"step": 50, "steps": 100, "rate": 640.0, "loss": 2.25}
    (tmp_path / "f1" / "progress.json").write_text(json.dumps(report))
    plan = plan_of(["best_in_time"])
    standings = Standings(plan)
    scores = dict.fromkeys((*plan.adaptation, *plan.held_out), 0.412)
    standings.scored(plan.trajectories[0].points[2].evaluate, scores)
    with Progress(3, 1, tmp_path, standings, console) as progress:
        progress.started("f1", "t3 photos_b: expert from ema")
    shown = "\n".join(lines(console))
    for text in (
        "1 of 3 steps done",
        "t3 photos_b: expert from ema",
        "50/100",
        "640/s",
        "2.250",
        "best_in_time",
        "2/3",
        "0.412",
    ):
        assert text in shown


class Screen:
    """Progress on a terminal, and what its next drawing will show."""

    def __init__(self, scratch: Path, plan: Plan) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        self.progress = Progress(3, 1, scratch, Standings(plan), console)

    def shown(self) -> str:
        paper = Console(file=io.StringIO(), width=120)
        paper.print(self.progress._view())
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
    assert training_columns({"step": 25, "steps": 100, "rate": 10.0, "loss": 1.0}, 5.0) == (
        "25/100",
        "10/s",
        "15 s",
        "1.000",
    )
    assert training_columns({"step": 0, "steps": 100}, 5.0) == ("0/100", "", "", "")
    assert training_columns({}, 5.0) == ("", "", "", "")


def test_read_progress_of_a_half_written_or_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_progress(tmp_path, "nobody") == {}
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "progress.json").write_text('{"step": 1')
    assert read_progress(tmp_path, "f") == {}
