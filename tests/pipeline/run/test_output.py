"""A reader that disconnects or stops reading, and a log on a full disk: the writer is not affected."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run import output
from pipeline.run.output import ReaderGone, Steady, steady
from pipeline.workspace.lock import read_driver
from tests.world import ROOT, Cluster, World, artifacts

RUN = [sys.executable, "-m", "pipeline.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """The two ends of a pipe that holds 4096 bytes."""
    ends = list(os.pipe())
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for end in ends:
        if end >= 0:
            os.close(end)


def leave(pipe: list[int]) -> None:
    """Close the reader's end, once: its number may be that of another thread's file afterwards."""
    os.close(pipe[0])
    pipe[0] = -1


def read_all(end: int, until: bytes) -> bytes:
    said = b""
    while until not in said:
        said += os.read(end, 2**16)
    return said


def test_writer_whose_reader_has_gone_goes_on_and_writes_to_nowhere(pipe: list[int]) -> None:
    stream = Steady(pipe[1])
    leave(pipe)
    assert stream.write(b"one\n") == 4
    stream.drain(10)
    assert Path(f"/proc/self/fd/{pipe[1]}").samefile(os.devnull)
    assert os.write(pipe[1], b"what a library says") and stream.write(b"two\n") == 4


def test_writer_whose_reader_has_stopped_is_not_held_up_and_says_what_was_left_out(
    pipe: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "BACKLOG_BYTES", 10_000)
    stream = Steady(pipe[1])
    for _ in range(40):
        stream.write(b"x" * 1000)
        stream.flush()
    said = read_all(pipe[0], b"left out]\n")
    kept = said.count(b"x")
    assert 10_000 <= kept < 40_000 and f"[{40_000 - kept} bytes that were not read".encode() in said
    stream.write(b"again\n")
    assert read_all(pipe[0], b"again\n")


def test_log_on_a_full_disk_costs_its_text_and_nothing_else() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    stream = Steady(full)
    assert stream.write(b"one\n") == 4
    stream.drain(10)
    os.close(full)


def test_answer_on_a_full_disk_ends_its_command_with_the_reason() -> None:
    with Path("/dev/full").open("wb") as full:
        answer = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "techniques"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert answer.returncode == 2
    assert answer.stderr == (
        "error: standard output cannot be written: No space left on device; send it to a place that has room\n"
    )


def test_answer_that_nobody_reads_ends_its_command(pipe: list[int]) -> None:
    leave(pipe)
    with pytest.raises(ReaderGone):
        Steady(pipe[1], exacting=True).write(b"answer\n")


def test_forked_process_writes_for_itself_and_survives_its_reader(pipe: list[int]) -> None:
    stream = Steady(pipe[1])
    stream.write(b"parent\n")
    stream.drain(10)

    def child() -> int:
        pid = os.fork()
        if pid == 0:
            stream.write(b"child\n")
            stream.flush()
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert child() == 7 and os.read(pipe[0], 100) == b"parent\nchild\n"
    leave(pipe)
    assert child() == 7


def test_streams_that_a_notebook_has_replaced_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with steady():
        assert (sys.stdout, sys.stderr) == before
        print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_everything_that_is_read_arrives_in_order() -> None:
    code = (
        "import sys\nfrom pipeline.run.output import steady\n"
        "with steady(exacting=True):\n"
        "    for n in range(2000): print(n, file=sys.stderr if n % 3 else sys.stdout)\n"
        "    with steady(): print('within', end='')\n"
        "print('.')"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=True,
    )  # fmt: skip
    assert said.stdout.splitlines() == [*map(str, range(2000)), "within."]


def test_command_whose_answer_is_cut_by_its_reader_ends_quietly(pipe: list[int], tmp_path: Path) -> None:
    leave(pipe)
    done = subprocess.run(
        [*RUN, "techniques"], cwd=ROOT, env=ENVIRONMENT, stdout=pipe[1], stderr=subprocess.PIPE, timeout=60
    )
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.ray
@pytest.mark.parametrize("reader", ["goes away", "stops reading"])
def test_study_ends_well_whatever_its_reader_does(
    reader: str, pipe: list[int], world: World, cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = [*RUN, "run", str(world.study()), "--out", str(out), "--address", cluster.address]
    answers = pipe[1] if reader == "goes away" else subprocess.DEVNULL
    if reader == "stops reading":
        os.write(pipe[1], b"x" * 4096)
    driver = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=answers, stderr=pipe[1])
    if reader == "goes away":
        assert os.read(pipe[0], 10)
        leave(pipe)
    assert driver.wait(200) == 0
    assert read_driver(out)["ended"] is True and read_driver(out)["failed"] is None
    assert artifacts(out) == artifacts(undisturbed)
