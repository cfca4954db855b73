"""Pools of long-lived actor groups, in which the driver runs its steps.

A group is W actors that work on one call together (W = 1 for most). A group is created when it is first needed, stays
alive between calls, and is dropped whole when one member fails, since the others cannot work without it. Pools of
several shapes share one capacity: an idle group may be dropped for another shape, a busy group never is.
Invariant: a pool never waits without a deadline for resources that the cluster cannot provide.
"""

import itertools
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import state
from ray.exceptions import ActorUnschedulableError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.capacity import Capacity, Shape, Share
from cluster.code import CodeMismatch, check_code, code_digest
from cluster.errors import ClusterError
from cluster.memory import (
    MORE_MEMORY,
    OutOfMemory,
    is_about_memory,
    kernel_kills,
    limit_memory,
    out_of_memory,
    peak_on_gpu,
    peak_resident,
    reset_peaks,
)
from cluster.portable import portable


class WorkerLost(Exception):
    """An actor died or became unreachable before it answered; its work may run again."""


class PlaceLost(WorkerLost):
    """The node chosen for a worker left before the worker started, so nothing was tried."""


PLACEMENT_SECONDS = 60.0
"""Timeout for placing a group of several members, in seconds."""


_FOREIGN_CODE = re.compile(r"ModuleNotFoundError|ImportError|AttributeError: (Can't get|module) ")
"""Import errors that mean the node runs other code: another version of this project, or another package of its name."""

_numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)
"""A counter per pool name, so that group names are unique in this process."""


@dataclass(frozen=True)
class Usage:
    """What a call used in the process of one member: CPU seconds over all threads, start and end (Unix seconds), the
    node, and peak memory (bytes): resident, mapped files included, and on its GPU.
    """

    cpu_seconds: float
    start: float
    end: float
    node: str
    memory: int = 0
    gpu_memory: int = 0


class Metered:
    """The methods of every actor of a pool beside its own work."""

    _budget: int | None = None

    def begin(self, code: str, memory: int | None) -> None:
        """The first call: check that the code is the driver's, and limit the memory (bytes). Raises CodeMismatch."""
        check_code(code, _where())
        self._budget = memory
        if memory is not None:
            limit_memory(memory)

    def metered(self, method: str, *arguments: Any) -> tuple[Any, Usage]:
        """The answer of a method and its usage."""
        reset_peaks()
        start, cpu = time.time(), time.process_time()
        try:
            answer = getattr(self, method)(*arguments)
        except Exception as error:
            sent = out_of_memory(error, self._budget) or portable(error)
            if sent is error:
                raise
            raise sent from None
        took = time.process_time() - cpu
        return answer, Usage(took, start, time.time(), _where(), peak_resident(), peak_on_gpu())


def _where() -> str:
    """The node of this process: its address and the first digits of its id."""
    return f"{ray.util.get_node_ip_address()}/{ray.get_runtime_context().get_node_id()[:6]}"


@dataclass(eq=False)
class Group:
    """W actors, their share of the capacity and, for W > 1, their placement group.

    `starting` are the references that must succeed before the members can answer; it is empty once they have.
    """

    name: str
    members: list[Any]
    share: Share | None = None
    placement: PlacementGroup | None = None
    starting: list[Any] = field(default_factory=list)
    idle: bool = True
    since: float = field(default_factory=time.monotonic)
    """When the group was created, first seen placed, or last became idle."""
    _placed: bool = False

    @property
    def up(self) -> bool:
        """Whether all members have answered once: their processes run and have found each other."""
        if self.starting and not ray.wait(self.starting, num_returns=len(self.starting), timeout=0)[1]:
            self.starting = []
        return not self.starting

    @property
    def placed(self) -> bool:
        """Whether every member has a process on some node. The process need not be up yet; see `up`."""
        if not self._placed:
            tables = [state.actors(member._actor_id.hex()) for member in self.members]
            self._placed = all(table.get("Address", {}).get("IPAddress") for table in tables)
            self.since = time.monotonic() if self._placed else self.since
        return self._placed

    def kill(self) -> None:
        for member in self.members:
            ray.kill(member)
        if self.placement is not None:
            remove_placement_group(self.placement)


@dataclass(eq=False)
class Call:
    """One call in progress on one group."""

    group: Group
    refs: list[Any]
    pool: "Pool" = field(repr=False)
    usages: list[Usage] = field(default_factory=list)
    """The usage of every member, once `results` has returned."""

    def __post_init__(self) -> None:
        self.pending, self._kernel_kills = list(self.refs), kernel_kills()

    def abandon(self) -> None:
        """Cancel the call by ending its group. A process that does not react is killed by its node."""
        self.pool.drop(self.group)

    def result(self) -> Any:
        """The answer of rank 0; otherwise like `results`."""
        return self.results()[0]

    def results(self) -> list[Any]:
        """The answers of all members; the group becomes idle.

        Raises the actor's error, or CodeMismatch, OutOfMemory or WorkerLost; the group is then dropped.
        """
        try:
            answers = ray.get(self.refs)[-len(self.group.members) :]
        except BaseException as error:
            self.pool.drop(self.group)
            if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
                raise error.cause from None
            if isinstance(error, RayError) and _FOREIGN_CODE.search(str(error)):
                raise CodeMismatch.found(
                    f"a worker runs other code than this driver ({_reason(error)})"
                ) from error
            if isinstance(error, RayError):
                raise self._lost(error) from error
            raise
        self.group.idle, self.group.since, self.group.starting = True, time.monotonic(), []
        self.usages = [usage for _, usage in answers]
        return [answer for answer, _ in answers]

    def _lost(self, error: RayError) -> Exception:
        """The error for a lost worker."""
        reason = _reason(error)
        if isinstance(error, ActorUnschedulableError):
            return PlaceLost(reason)
        if is_about_memory(str(error)):
            return OutOfMemory(
                f"out of memory (OOM): Ray ended the worker because the memory of its node was running out; {MORE_MEMORY} ({reason})"
            )
        if kernel_kills() > self._kernel_kills:
            return OutOfMemory(
                f"out of memory (OOM): the kernel of this machine has killed a process because memory ran out, and a worker is gone; "
                f"{MORE_MEMORY} ({reason})"
            )
        return WorkerLost(reason)


@dataclass(frozen=True)
class Terms:
    """How the groups of a pool are created.

    `gather` is called once with the members of a new group, for example so that they find each other. It returns
    references that the first call waits for. `strategy` is Ray's placement strategy: PACK keeps members together,
    SPREAD uses as many nodes as there are. A `patient` pool waits for its placement without limit, since nodes may
    still join. `memory` is the limit of each actor in bytes, without mapped files; None is the memory of the machine.
    """

    gather: Callable[[list[Any]], list[Any]] | None = None
    strategy: str = "PACK"
    patient: bool = False
    memory: int | None = None


class Pool:
    """Groups of one shape, each of its `world` actors with its own CPUs and GPUs.

    Args:
        actor: the plain class of the actors.
        make: builds the actor of one rank: `make(remote_class, rank)`.
    """

    def __init__(
        self,
        name: str,
        actor: type,
        make: Callable[[Any, int], Any],
        shape: Shape = Shape(),
        terms: Terms = Terms(),
    ) -> None:
        self.name, self.make, self.shape, self.terms = name, make, shape, terms
        self.actor: Any = ray.remote(type(actor.__name__, (Metered, actor), {}))
        self.groups: list[Group] = []
        self.on_drop: Callable[[Group], None] = lambda group: None

    @property
    def idle(self) -> Group | None:
        """The group that became idle last; what it holds in memory is the most recent."""
        return max(
            (group for group in self.groups if group.idle), key=lambda group: group.since, default=None
        )

    def call(self, method: str, *arguments: Any, group: Group | None = None) -> Call:
        """Start `method` on every member of `group`, or of an idle group, which is created if there is none."""
        group = group or self.idle or self.open()
        group.idle = False
        refs = [member.metered.remote(method, *arguments) for member in group.members]
        return Call(group, [*group.starting, *refs], self)

    def open(self, share: Share | None = None) -> Group:
        """A new group, on the nodes of `share` if one is given."""
        shape = self.shape
        options: dict[str, Any] = {"num_cpus": shape.cpus, "num_gpus": shape.gpus, "max_restarts": 0}
        placement = self._place() if shape.world > 1 else None
        members = []
        for rank in range(shape.world):
            if placement is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=rank
                )
            elif share is not None and share.places:
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(share.nodes[0], soft=False)
            members.append(self.make(self.actor.options(**options), rank))
        group = Group(f"{self.name}-{next(_numbers[self.name])}", members, share, placement)
        self.groups.append(group)
        group.starting = [member.begin.remote(code_digest(), self.terms.memory) for member in members]
        if self.terms.gather is not None:
            group.starting += self.terms.gather(members)
        return group

    def drop(self, group: Group) -> None:
        group.kill()
        if group in self.groups:
            self.groups.remove(group)
            self.on_drop(group)

    def close(self) -> None:
        for group in list(self.groups):
            self.drop(group)

    def _place(self) -> PlacementGroup:
        shape = self.shape
        bundle = {"CPU": shape.cpus} | ({"GPU": shape.gpus} if shape.gpus else {})
        placement = placement_group([bundle] * shape.world, strategy=self.terms.strategy)
        if not self.terms.patient and not placement.wait(PLACEMENT_SECONDS):
            remove_placement_group(placement)
            raise ClusterError(
                f"no place for {shape.world} {self.name} workers with {shape.cpus:g} CPUs and {shape.gpus:g} GPUs each "
                f"within {PLACEMENT_SECONDS:g} s; free some, add nodes, or lower `resources`"
            )
        return placement


LINGER_SECONDS = 5.0
"""How long an idle group is kept from other shapes while anything runs, because restarting it takes longer."""


class Pools:
    """Pools of several shapes that share one capacity. Without a capacity (`None`), Ray alone decides what fits and when."""

    def __init__(self, pools: dict[str, Pool], capacity: Capacity | None) -> None:
        self.by_name, self.capacity = pools, capacity
        for pool in pools.values():
            pool.on_drop = self._give_back

    def group(self, name: str, avoid: Collection[str] = ()) -> Group | None:
        """An idle group, or a new one if the capacity allows it, if necessary after dropping idle groups of other pools.

        None if the caller has to wait. `avoid` are nodes that are reserved for another group.
        """
        pool = self.by_name[name]
        for group in sorted(pool.groups, key=lambda group: -group.since):
            if group.idle and (group.share is None or not set(group.share.nodes) & set(avoid)):
                return group
        if self.capacity is None or pool.shape.is_free:
            return pool.open()
        share = self.capacity.take(pool.shape, avoid) or self._make_room(pool, avoid)
        if share is None:
            return None
        try:
            return self._on_actual_nodes(pool.open(share))
        except BaseException:
            self.capacity.give(share)
            raise

    def drop_idle(self, seconds: float) -> None:
        """Drop groups that have been idle for longer than `seconds`."""
        for pool, group in self._idle():
            if time.monotonic() - group.since > seconds:
                pool.drop(group)

    def not_up(self, seconds: float) -> list[Group]:
        """Groups that have not answered within `seconds` of their creation. With a capacity, each of them has a place in it."""
        groups = (group for pool in self.by_name.values() for group in pool.groups)
        return [group for group in groups if time.monotonic() - group.since > seconds and not group.up]

    def close(self) -> None:
        for pool in self.by_name.values():
            pool.close()

    @property
    def busy(self) -> bool:
        """Whether any group that holds a part of the capacity is working."""
        return any(
            not group.idle
            for pool in self.by_name.values()
            if not pool.shape.is_free
            for group in pool.groups
        )

    def _make_room(self, pool: Pool, avoid: Collection[str]) -> Share | None:
        """Drop idle groups, longest idle first, until the shape fits; None, with nothing dropped, if it cannot fit."""
        assert self.capacity is not None
        now, busy = time.monotonic(), self.busy
        idle = [
            (of, group)
            for of, group in self._idle()
            if group.share is not None and (not busy or now - group.since > LINGER_SECONDS)
            if not set(group.share.nodes) & set(avoid)
        ]
        if not self.capacity.fits_beside(
            pool.shape, [group.share for _, group in idle if group.share], avoid
        ):
            return None
        share = None
        while share is None:
            of, group = idle.pop(0)
            of.drop(group)
            share = self.capacity.take(pool.shape, avoid)
        return share

    def _idle(self) -> list[tuple[Pool, Group]]:
        """Idle groups that hold a part of the capacity, longest idle first."""
        found = [(pool, group) for pool in self.by_name.values() for group in pool.groups if group.idle]
        return sorted((pair for pair in found if not pair[0].shape.is_free), key=lambda pair: pair[1].since)

    def _on_actual_nodes(self, group: Group) -> Group:
        """Correct the share of a group that Ray has placed, since Ray may have chosen other nodes that fit as well."""
        if group.placement is not None and group.share is not None and self.capacity is not None:
            table = ray.util.placement_group_table(group.placement)
            where = [node for _, node in sorted(table["bundles_to_node_id"].items())]
            self.capacity.move(group.share, where)
        return group

    def _give_back(self, group: Group) -> None:
        if self.capacity is not None and group.share is not None:
            self.capacity.give(group.share)


def wait(calls: Sequence[Call], timeout: float) -> list[Call]:
    """The calls that have ended, with a result or an error, after at most `timeout` seconds."""
    refs = [ref for call in calls for ref in call.pending]
    if not refs:
        time.sleep(timeout)
        return []
    ready = set(ray.wait(refs, num_returns=1, timeout=timeout)[0])
    ready |= set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])
    return [call for call in calls if _ended(call, ready)]


def _ended(call: Call, ready: set[Any]) -> bool:
    """Whether all members have answered, or one has failed (the others may then hang in a collective forever)."""
    answered = [ref for ref in call.pending if ref in ready]
    call.pending = [ref for ref in call.pending if ref not in ready]
    return not call.pending or any(map(_failed, answered))


def _failed(ref: Any) -> bool:
    try:
        ray.get(ref, timeout=0)
    except Exception:
        return True
    return False


def _reason(error: Exception) -> str:
    """Ray's message without its advice: the lines that say what happened to which process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"died|killed|oom|^\w+error:", line, re.IGNORECASE)]
    return " ".join((telling or lines or [type(error).__name__])[:2])
