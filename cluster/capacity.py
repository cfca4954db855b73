"""CPUs and GPUs of the nodes and the shares taken of them: pure arithmetic, so that no request exceeds what can be given.

Invariant: a share fits its nodes as Ray would place it. Each member of a group is on one node, whole GPUs are whole
devices, and a fraction of a GPU is on one device. Giving a share back frees exactly what was taken.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Node:
    """One machine as Ray reports it, with its total resources."""

    id: str
    address: str
    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return f"{self.address} with {self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True)
class Shape:
    """The resources of a group: `world` members, each with this many CPUs, GPUs and threads."""

    world: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1

    @property
    def is_free(self) -> bool:
        """Whether the group takes no resource that could run out."""
        return not self.cpus and not self.gpus

    def __str__(self) -> str:
        return f"{self.world} x ({self.cpus:g} CPUs, {self.gpus:g} GPUs)"


@dataclass
class _Left:
    """The unused resources of a node; `devices` holds the unused fraction of each GPU."""

    cpus: float
    devices: list[float]

    @property
    def total(self) -> float:
        return self.cpus + 1000 * sum(self.devices)

    def pick(self, shape: Shape) -> list[int] | None:
        """The devices for one member, those with the least left that suffices first; None if the member does not fit."""
        if self.cpus + _ROUNDING < shape.cpus:
            return None
        share, count = min(shape.gpus, 1.0), int(max(shape.gpus, 1.0)) if shape.gpus else 0
        fitting = [index for index, left in enumerate(self.devices) if left + _ROUNDING >= share]
        fitting.sort(key=lambda index: self.devices[index])
        return fitting[:count] if len(fitting) >= count else None

    def change(self, shape: Shape, devices: list[int], sign: int) -> None:
        self.cpus += sign * shape.cpus
        for index in devices:
            self.devices[index] += sign * min(shape.gpus, 1.0)


@dataclass(eq=False)
class Share:
    """The resources that a group holds: the node of each member and its devices there."""

    shape: Shape
    places: list[tuple[str, list[int]]] = field(default_factory=list)

    @property
    def nodes(self) -> list[str]:
        """The node of each member, in rank order."""
        return [node for node, _ in self.places]


class Capacity:
    """The nodes and the unused resources of each."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes: dict[str, Node] = {}
        self._left: dict[str, _Left] = {}
        self.update(nodes)

    def update(self, nodes: Iterable[Node]) -> None:
        """Add nodes that have joined. Forget nodes that have left, with all shares on them."""
        present = {node.id: node for node in nodes}
        for gone in self.nodes.keys() - present.keys():
            del self._left[gone]
        for new in present.keys() - self.nodes.keys():
            self._left[new] = _whole(present[new])
        self.nodes = present

    def take(self, shape: Shape, avoid: Collection[str] = ()) -> Share | None:
        """A share for a whole group on as few nodes as possible outside `avoid`; None, with nothing taken, if it does not fit."""
        left = {name: node for name, node in self._left.items() if name not in avoid}
        share = _fill(shape, left)
        if len(share.places) == shape.world:
            return share
        self.give(share)
        return None

    def give(self, share: Share) -> None:
        """Free a share."""
        for name, devices in share.places:
            if name in self._left:
                self._left[name].change(share.shape, devices, +1)
        share.places.clear()

    def move(self, share: Share, nodes: Sequence[str]) -> None:
        """Change a share to the nodes on which its members really are."""
        self.give(share)
        for name in nodes:
            if name in self._left:
                devices = self._left[name].pick(share.shape) or []
                self._left[name].change(share.shape, devices, -1)
                share.places.append((name, devices))

    def fits_beside(self, shape: Shape, shares: Iterable[Share], avoid: Collection[str] = ()) -> bool:
        """Whether a group would fit outside `avoid` if `shares` were freed."""
        free = {name: node for name, node in self._left.items() if name not in avoid}
        left = {name: _Left(node.cpus, list(node.devices)) for name, node in free.items()}
        for share in shares:
            for name, devices in share.places:
                if name in left:
                    left[name].change(share.shape, devices, +1)
        return len(_fill(shape, left).places) == shape.world

    def could_hold(self, shape: Shape) -> bool:
        """Whether a group would fit if all nodes were empty."""
        return not self.lacking(shape)

    def lacking(self, shape: Shape) -> str:
        """Why a group can never be placed on these nodes; empty if it can."""
        alone = _fill(shape, {name: _whole(node) for name, node in self.nodes.items()})
        if len(alone.places) == shape.world:
            return ""
        if not alone.places:
            largest = max(self.nodes.values(), key=lambda node: (node.gpus, node.cpus), default=None)
            return (
                f"no node can hold one of them; the largest is {largest}" if largest else "there is no node"
            )
        return f"only {len(alone.places)} of the {shape.world} fit"

    def reserved_for(self, shape: Shape) -> set[str]:
        """The nodes to keep free for a waiting group: of the nodes that can hold it when empty, those with the most left."""
        names = sorted(self.nodes, key=lambda name: -self._left[name].total)
        empty = {name: _whole(self.nodes[name]) for name in names}
        return set(_fill(shape, empty, packed=False).nodes)

    def __str__(self) -> str:
        cpus = sum(node.cpus for node in self.nodes.values())
        gpus = sum(node.gpus for node in self.nodes.values())
        shown = [str(node) for node in self.nodes.values()]
        rest = f", and {len(shown) - 8} more" if len(shown) > 8 else ""
        return f"{cpus:g} CPUs and {gpus:g} GPUs ({', '.join(shown[:8])}{rest})"


def _whole(node: Node) -> _Left:
    return _Left(node.cpus, [1.0] * int(node.gpus))


def _fill(shape: Shape, left: Mapping[str, _Left], packed: bool = True) -> Share:
    """Place as many members as fit. Packed: nodes that hold the most members first, then those with the least left."""
    share = Share(shape)
    order = sorted(left, key=lambda name: _packing(shape, left[name])) if packed else list(left)
    for name in order:
        while len(share.places) < shape.world and (devices := left[name].pick(shape)) is not None:
            left[name].change(shape, devices, -1)
            share.places.append((name, devices))
    return share


def _packing(shape: Shape, left: _Left) -> tuple[int, float]:
    trial, count = _Left(left.cpus, list(left.devices)), 0
    while count < shape.world and (devices := trial.pick(shape)) is not None:
        trial.change(shape, devices, -1)
        count += 1
    return -count, left.total
