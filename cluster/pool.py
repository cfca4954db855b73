"""Pools of long-lived actor groups: where the driver gets work done.

A group is W actors that work on one call together (W = 1 for most). Groups are made when they are first needed, stay
alive from call to call, and are thrown away whole as soon as one member fails: half a group is of no use.
Invariant: a pool never waits without a deadline for a place that the cluster cannot give.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.session import ClusterError, Session


class WorkerLost(Exception):
    """An actor died, or could not be reached, before it answered; what it was doing may run again."""


PLACEMENT_SECONDS = 60.0
"""How long a group may wait for its place before the study says so."""


@dataclass(eq=False)
class Group:
    """W actors and, for W > 1, the placement that keeps them together."""

    members: list[Any]
    placement: PlacementGroup | None = None
    idle: bool = True

    def kill(self) -> None:
        for member in self.members:
            ray.kill(member)
        if self.placement is not None:
            remove_placement_group(self.placement)


@dataclass(eq=False)
class Call:
    """One piece of work under way on one group."""

    group: Group
    refs: list[Any]
    pool: "Pool" = field(repr=False)

    def result(self) -> Any:
        """Rank 0's answer; else as `results`."""
        return self.results()[0]

    def results(self) -> list[Any]:
        """Everybody's answer; frees the group. Raises what the actor raised, or WorkerLost; the group is then gone."""
        try:
            answers: list[Any] = ray.get(self.refs)
        except BaseException as error:
            self.pool.drop(self.group)
            if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
                raise error.cause from None
            if isinstance(error, RayError):
                raise WorkerLost(_reason(error)) from error
            raise
        self.group.idle = True
        return answers


class Pool:
    """At most `limit` groups of `world` actors, each actor with its own CPUs and GPUs.

    Args:
        actor: the plain class of the actors.
        make: builds the actor of one rank: `make(remote_class, rank)`.
        gather: called once on a new group's members, e.g. to let them find each other.
        strategy: Ray's placement of a group's members: PACK keeps them together, SPREAD takes as many nodes as there are.
    """

    def __init__(
        self,
        name: str,
        actor: type,
        make: Callable[[Any, int], Any],
        *,
        world: int = 1,
        cpus: float = 1.0,
        gpus: float = 0.0,
        limit: int = 1,
        gather: Callable[[list[Any]], None] | None = None,
        strategy: str = "PACK",
    ) -> None:
        self.name, self.make, self.gather, self.strategy = name, make, gather, strategy
        self.actor: Any = ray.remote(actor)
        self.world, self.cpus, self.gpus, self.limit = world, cpus, gpus, limit
        self.groups: list[Group] = []

    @property
    def free(self) -> int:
        """How many calls could start now."""
        return self.limit - sum(not group.idle for group in self.groups)

    def call(self, method: str, *arguments: Any) -> Call:
        """Start `method` on every member of an idle group, making one if need be."""
        group = next((group for group in self.groups if group.idle), None) or self._new_group()
        group.idle = False
        refs = [getattr(member, method).remote(*arguments) for member in group.members]
        return Call(group, refs, self)

    def drop(self, group: Group) -> None:
        group.kill()
        if group in self.groups:
            self.groups.remove(group)

    def close(self) -> None:
        for group in list(self.groups):
            self.drop(group)

    def _new_group(self) -> Group:
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0}
        placement = self._place() if self.world > 1 else None
        members = []
        for rank in range(self.world):
            if placement is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=rank
                )
            members.append(self.make(self.actor.options(**options), rank))
        group = Group(members, placement)
        self.groups.append(group)
        if self.gather is not None:
            self.gather(members)
        return group

    def _place(self) -> PlacementGroup:
        bundle = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        placement = placement_group([bundle] * self.world, strategy=self.strategy)
        if not placement.wait(PLACEMENT_SECONDS):
            remove_placement_group(placement)
            raise ClusterError(
                f"no place for {self.world} {self.name} workers with {self.cpus:g} CPUs and {self.gpus:g} GPUs each "
                f"within {PLACEMENT_SECONDS:g} s; free some, add nodes, or lower `resources`"
            )
        return placement


def wait(calls: Sequence[Call], timeout: float) -> list[Call]:
    """The calls that have ended, well or badly, after at most `timeout` seconds."""
    refs = [ref for call in calls for ref in call.refs]
    if not refs:
        return []
    ready = set(ray.wait(refs, num_returns=1, timeout=timeout)[0])
    ready |= set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])
    return [call for call in calls if _ended(call, ready)]


def _ended(call: Call, ready: set[Any]) -> bool:
    """All members answered, or one failed (its group mates may hang in a collective for ever)."""
    if all(ref in ready for ref in call.refs):
        return True
    return any(ref in ready and _failed(ref) for ref in call.refs)


def _failed(ref: Any) -> bool:
    try:
        ray.get(ref, timeout=0)
    except Exception:
        return True
    return False


def _reason(error: Exception) -> str:
    """Ray's message without its advice: the lines that say what happened to which process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines if "died" in line.lower() or "killed" in line.lower() or "oom" in line.lower()
    ]
    return " ".join((telling or lines or [type(error).__name__])[:2])


def group_limit(
    wanted: int | None, session: Session, world: int, cpus: float, gpus: float, reserved: tuple[float, float]
) -> int:
    """How many groups to keep: what was asked for, or as many as fit beside what is `reserved` (CPUs, GPUs).

    Raises ClusterError if not even one, or not all that were asked for, can ever have a place.
    """
    room = [
        (total - kept) / (world * share)
        for total, kept, share in ((session.cpus, reserved[0], cpus), (session.gpus, reserved[1], gpus))
        if share
    ]
    fits = int(min(room, default=1) + 1e-9)
    if fits < (wanted or 1):
        raise ClusterError(
            f"{wanted or 1} groups of {world} x ({cpus:g} CPUs, {gpus:g} GPUs) for experts, beside {reserved[0]:g} CPUs and "
            f"{reserved[1]:g} GPUs for evaluation, do not fit into {session.cpus:g} CPUs and {session.gpus:g} GPUs; lower "
            "resources.experts or resources.evaluation, or add nodes"
        )
    return wanted or fits
