"""The acceptance of the live service, row by row: which tests show it, run in their slow sizes, and what two cores cannot show.

    python -m tests.pipeline.service.soak [--rows 2 6] [--arrivals 1000] [--examples 60]

`make soak-service` runs it. The table of docs/service.md is `table()`.
Invariant: a row without a test says so, and a row whose tests were skipped is not shown as passed.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.world import ROOT

HERE = "tests/pipeline/service"
ARRIVALS, EXAMPLES, SWAPS = "SOAK_ARRIVALS", "SOAK_EXAMPLES", "SOAK_SWAPS"
"""Variables of the environment: arrivals of row 4, how many times as many requests of a kind row 16 sends, and rollbacks of row 20."""


@dataclass(frozen=True)
class Row:
    """One row: its number and subject, its tests as pytest names them, and what they leave open."""

    number: int
    subject: str
    tests: tuple[str, ...] = ()
    missing: str = ""


ROWS = (
    Row(1, "six experts arrive, one is removed, another time step served", (f"{HERE}/test_together.py",), "`make serve-demo` goes the whole way; its seconds are not asserted"),
    Row(2, "hundred swaps under eight clients", (f"{HERE}/test_outside.py::test_hundred_swaps_under_load_fail_nothing_mix_nothing_and_leave_no_memory",), "rate and p99: `benchmarks/serving.py`"),
    Row(3, "each answer by a model that was promoted then", (f"{HERE}/test_outside.py::test_ten_swaps_under_load_fail_nothing_and_mix_nothing",)),
    Row(4, "thousand arrivals", (f"{HERE}/test_thousand.py", f"{HERE}/test_flat.py"), "one submitter, in one process; CPU is printed"),
    Row(5, "delivered twice, shuffled, over cut connections", (f"{HERE}/test_client.py::test_experts_delivered_twice_shuffled_over_cut_connections_come_once",), "twelve experts"),
    Row(6, "killed at each point", (f"{HERE}/test_kill.py", f"{HERE}/test_outside.py::test_killed_worker_loses_no_more_than_it_was_answering_and_comes_back", f"{HERE}/test_outside.py::test_connections_wait_while_all_workers_are_dead", f"{HERE}/test_outside.py::test_workers_of_a_killed_supervisor_end_and_the_same_command_resumes"), "Ray's processes: row 20"),
    Row(7, "power cut", (f"{HERE}/test_service_power_cut.py", "tests/faults/test_power_cut.py"), "the calls of one process are recorded and cut off at 30 of its moments; no machine lost its power"),
    Row(8, "poisoned experts", (f"{HERE}/test_poison.py",), "toys; real experts: [the gates](#the-gates)"),
    Row(9, "backdoor, removed and purged", (f"{HERE}/test_removal.py::test_purge_needs_a_removal_deletes_the_bytes_and_refuses_them_for_ever",), "no backdoor was trained"),
    Row(10, "removal at each place", (f"{HERE}/test_removal.py",)),
    Row(11, "rollback", (f"{HERE}/test_worker.py::test_rollback_moves_what_is_served_and_the_next_arrival_builds_on_the_newest",), "seconds are not asserted"),
    Row(12, "forged, replayed, oversized, slow", (f"{HERE}/test_app.py", f"{HERE}/test_live_http.py", f"{HERE}/test_outside.py::test_slow_clients_are_cut_off", f"{HERE}/test_outside.py::test_many_wrong_tokens_leave_answers_going"), "300 wrong tokens; experts by URI are not there yet"),
    Row(13, "tampering", (f"{HERE}/test_log.py",)),
    Row(14, "MLflow down, then up", (f"{HERE}/registry/test_registry.py",), "a dozen arrivals"),
    Row(15, "disk full", (f"{HERE}/test_live_http.py::test_full_disk_closes_the_door_to_uploads_and_reading_goes_on", f"{HERE}/test_app.py::test_full_disk_is_said_and_what_is_registered_goes_on", f"{HERE}/test_metrics_files.py"), "a full file system was tried by hand"),
    Row(16, "requests at random against the description", (f"{HERE}/test_schema.py",), "in one process, without a socket"),
    Row(17, "page in a browser", ("tests/ui/test_service_page.py", f"{HERE}/test_page.py")),
    Row(18, "interrupted upload", (f"{HERE}/test_client.py::test_interrupted_upload_goes_on_after_a_restart_and_sends_at_most_one_part_again",), "small parts, not 2 GB"),
    Row(19, "replay into an empty place", (f"{HERE}/test_removal.py::test_replay_into_an_empty_place_serves_the_same_bytes_and_goes_on",), "five experts and a removal"),
    Row(20, "two replicas on Ray: rows 2, 6 and 11", (f"{HERE}/test_on_ray.py", f"{HERE}/test_ray_home.py"), "one node; rate is not compared"),
)  # fmt: skip


def table() -> str:
    """Markdown: each row with its tests and what is missing."""
    lines = ["| # | what | tests | what they leave open |", "|---|---|---|---|"]
    for row in ROWS:
        files = dict.fromkeys(one.partition("::")[0].rpartition("/")[2] for one in row.tests)
        tests = ", ".join(f"`{name}`" for name in files) or "none"
        lines.append(f"| {row.number} | {row.subject} | {tests} | {row.missing} |")
    return "\n".join(lines)


def outcome(row: Row, environment: dict[str, str]) -> str:
    """Run the tests of a row, whatever their marks: "passed", or what else came of them."""
    if not row.tests:
        return "no test"
    command = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", *row.tests]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counted = re.search(r"^(\d+ .*) in [\d.:]+s", answer.stdout, re.MULTILINE)
    said = counted[1] if counted else "no count of tests"
    if answer.returncode or counted is None:
        print(answer.stdout[-4000:], answer.stderr[-2000:], file=sys.stderr)
        return f"FAILED: {said}"
    return said


def main() -> int:
    """Run the rows, print a line for each, and end with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", help="only these")
    parser.add_argument("--arrivals", type=int, default=1000, help="of row 4, at least 100")
    parser.add_argument(
        "--examples",
        type=int,
        default=60,
        help="times as many requests of each kind in row 16 as in `make test`",
    )
    given = parser.parse_args()
    environment = {**os.environ, ARRIVALS: str(given.arrivals), EXAMPLES: str(given.examples), SWAPS: "100"}
    print("| # | what | outcome | seconds |\n|---|---|---|---|", flush=True)
    failed = False
    for row in ROWS:
        if given.rows and row.number not in given.rows:
            continue
        began = time.monotonic()
        found = outcome(row, environment)
        failed |= found.startswith("FAILED")
        print(f"| {row.number} | {row.subject} | {found} | {time.monotonic() - began:.0f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
