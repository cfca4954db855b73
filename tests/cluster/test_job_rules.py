"""Which job of a study is used: rules that need no cluster."""

from pathlib import Path

import pytest
import ray

from cluster.session import ClusterError
from cluster.submission import OLDEST_RAY, Cluster, Job, _Taken


class Remembered(Cluster):
    """A cluster that is a list of jobs. `rival` is a job that another client submits in between, once."""

    def __init__(self, *jobs: Job, rival: Job | None = None) -> None:
        self.url, self.list, self.rival = "http://head:8265", list(jobs), rival

    def jobs(self) -> list[Job]:
        return list(self.list)

    def job(self, name: str) -> Job:
        return next(job for job in self.list if job.id == name)

    def submit(self, name: str, command: str, room: Path, metadata: dict[str, str]) -> None:
        if self.rival is not None:
            self.list.append(self.rival)
            self.rival = None
        if name in [job.id for job in self.list]:
            raise _Taken(name)
        self.list.append(job(name))


def job(name: str, ended: bool = False) -> Job:
    return Job(name, "running", ended, None, "", {})


def answer(cluster: Remembered) -> tuple[str, bool]:
    found, attached = cluster.submit_or_attach("study-1", "command", Path(), {})
    return found.id, attached


def test_study_that_no_job_works_on_gets_one_and_who_comes_later_watches_it() -> None:
    cluster = Remembered(job("other-1.1"), job("study-1.x"))
    assert answer(cluster) == ("study-1.1", False)
    assert answer(cluster) == ("study-1.1", True)


def test_job_that_has_ended_is_followed_by_the_next_attempt() -> None:
    assert answer(Remembered(job("study-1.9", ended=True), job("study-1.10", ended=True))) == (
        "study-1.11",
        False,
    )


def test_job_that_somebody_else_submits_at_the_same_moment_is_the_one() -> None:
    cluster = Remembered(rival=job("study-1.1"))
    assert answer(cluster) == ("study-1.1", True)
    assert [one.id for one in cluster.jobs()] == ["study-1.1"]


def test_cluster_with_a_ray_that_knows_no_tokens_is_refused_with_both_versions() -> None:
    cluster = Remembered()
    cluster._check_version(".".join(map(str, OLDEST_RAY)) + ".0")
    with pytest.raises(
        ClusterError, match=rf"runs Ray 2\.58\.1, this machine {ray.__version__}; .* 2\.59 or newer"
    ):
        cluster._check_version("2.58.1")
