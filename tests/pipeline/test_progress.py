"""What a person sees while a study runs."""

import io
import json
from pathlib import Path

from rich.console import Console

from pipeline.progress import Progress, read_progress, training_columns


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_progress_off_a_terminal_is_one_plain_line_per_step(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with Progress(3, 1, tmp_path, lambda: [], console) as progress:
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
    with Progress(3, 1, tmp_path, lambda: [("best_in_time", 2, 6, "0.412")], console) as progress:
        progress.started("f1", "t3 photos_b: expert from ema")
    shown = "\n".join(lines(console))
    for text in (
        "1 of 3 steps done",
        "t3 photos_b: expert from ema",
        "50/100",
        "640/s",
        "2.250",
        "best_in_time",
        "2/6",
        "0.412",
    ):
        assert text in shown


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
