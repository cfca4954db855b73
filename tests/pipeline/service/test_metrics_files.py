"""The files of metrics have all their blocks from the beginning: a page without one on a full disk would end the process."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.service import metrics

EVERY = """
from pipeline.service.metrics import Metrics
of = Metrics()
for route in range(60):
    of.seconds.labels("/v1/uploads/{number}/parts/{name}/" + str(route)).observe(1)
    for status in range(10):
        of.requests.labels("/v1/uploads/{number}/parts/{name}/" + str(route), str(status), "submitter").inc()
of.batch_size.observe(1), of.queue.set(1), of.served_t.set(1), of.swaps.labels("served").observe(1)
of.restarts.labels("serving-0").inc(), of.auth_failures.labels("token.unknown").inc()
assert of.text().count(b"tm_requests_total{") == 600
"""


def test_no_file_of_metrics_grows_or_has_a_hole_whatever_is_counted(tmp_path: Path) -> None:
    metrics.begin(tmp_path / "metrics", ["0"])
    before = {one.name: one.stat().st_size for one in (tmp_path / "metrics").iterdir()}
    environment = {**os.environ, metrics.FOLDER: str(tmp_path / "metrics"), metrics.PLACE: "0"}
    subprocess.run([sys.executable, "-c", EVERY], env=environment, check=True)
    after = {one.name: one.stat() for one in (tmp_path / "metrics").iterdir()}
    assert {name: one.st_size for name, one in after.items()} == before
    assert all(512 * one.st_blocks >= one.st_size for one in after.values())
