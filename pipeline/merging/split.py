"""One merge on workers of a Ray cluster, each with its own tensors; the workers are spread over the nodes.

Invariant: weights never travel through Ray. Workers read and write files on storage that all nodes share; arguments and results
are small.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.capacity import Shape
from cluster.pool import Pool, Terms, WorkerLost
from cluster.session import ClusterError, Session, check_address, connect
from merge_service.engine import Part, PartWorker, Split


def split_over(address: str, workers: int, threads: int) -> Split:
    """A merge in `workers` parts on the Ray cluster at `address` (`local` starts one here), each with `threads` CPUs.

    The cluster is joined only after the merge has checked its inputs. Raises `ClusterError` when the address is unsafe or, then,
    when the cluster does not answer or is too small; `WorkerLost` when a worker dies; the output is then unchanged.
    """
    check_address(address)

    @contextmanager
    def hire(parts: Sequence[Part]) -> Iterator[Callable[..., list[Any]]]:
        with (
            connect(address, threads=threads, cpus=len(parts) * threads) as session,
            hired(session, parts, threads) as call,
        ):
            yield call

    return Split(workers, hire)


@contextmanager
def hired(session: Session, parts: Sequence[Part], threads: int) -> Iterator[Callable[..., list[Any]]]:
    """Workers for these parts, in a connected session."""
    if session.cpus < len(parts) * threads:
        raise ClusterError(
            f"{len(parts)} merge workers of {threads} threads do not fit into the {session.cpus:g} CPUs of the cluster; "
            "lower --workers or --threads, or add nodes"
        )
    pool = Pool(
        "merge", PartWorker, lambda actor, rank: actor.remote(parts[rank]),
        Shape(len(parts), threads), Terms(strategy="SPREAD"),
    )  # fmt: skip

    def call(method: str, *arguments: Any) -> list[Any]:
        try:
            return pool.call(method, *arguments).results()
        except WorkerLost as error:
            raise WorkerLost(
                f"a merge worker died ({error}); the output is untouched, run it again"
            ) from error

    try:
        yield call
    finally:
        pool.close()
