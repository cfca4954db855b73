"""The design of the study: pieces of one replicate at one setting each, read from configs/studies/when_ema/pieces.yaml.

Invariant: nothing here runs anything; two pieces of one replicate differ only in what `pieces.yaml` sets for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merge_service.errors import UserError
from merge_service.techniques import nearest
from pipeline.study.config import load_study
from pipeline.workspace.workspace import Workspace

FOLDER = Path("configs/studies/when_ema")
MODELS = Path("configs/models")
DEFAULT_MODEL = "tiny-clip-s"
CORES = 2


@dataclass(frozen=True)
class Piece:
    """One replicate at one setting. `settings` are the differences from study.yaml, as values of `--set`."""

    name: str
    replicate: int
    model: str
    settings: tuple[str, ...]
    core: bool

    @property
    def key(self) -> str:
        """The name of the piece's folder."""
        return f"{self.replicate}-{self.name}"


@dataclass(frozen=True)
class Design:
    """All pieces in the order in which they are run: replicate by replicate, the core before the fringe."""

    pieces: tuple[Piece, ...]
    base_seed: int
    cost: Mapping[str, Any]
    study: Path = FOLDER / "study.yaml"

    @property
    def core(self) -> tuple[str, ...]:
        """The names of the pieces of a complete replicate."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces if piece.core))

    @property
    def replicates(self) -> tuple[int, ...]:
        """The replicates of the core."""
        return tuple(dict.fromkeys(piece.replicate for piece in self.pieces if piece.core))

    def chosen(self, replicates: Sequence[int] | None, names: Sequence[str] | None) -> tuple[Piece, ...]:
        """The pieces of these replicates and names; only the core if no names are given. Raises UserError."""
        known = {piece.name for piece in self.pieces}
        for name in names or ():
            if name not in known:
                raise UserError(
                    f"no piece {name!r}{nearest(name, known)}; there are {', '.join(sorted(known))}"
                )
        strangers = set(replicates or ()) - set(self.replicates)
        if strangers:
            raise UserError(
                f"no replicate {', '.join(map(str, sorted(strangers)))}; there are {', '.join(map(str, self.replicates))}"
            )
        return tuple(
            piece
            for piece in self.pieces
            if (replicates is None or piece.replicate in replicates)
            and (piece.name in names if names else piece.core)
        )

    def overrides(self, piece: Piece, base: Path) -> list[str]:
        """The values of `--set` that run the piece with its base in the directory `base`."""
        seed = piece.replicate
        return [
            f"model.config={piece.model}", f"model.pretrained={base}", f"stream.seed={seed}", f"grid.seed=[{seed}]",
            *piece.settings,
        ]  # fmt: skip


def read_design(file: Path = FOLDER / "pieces.yaml") -> Design:
    """The design in `file`."""
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    pieces = [
        Piece(name, replicate, what.get("model", DEFAULT_MODEL), tuple(what.get("set", ())), group == "core")
        for group in ("core", "fringe")
        for replicate in plan["replicates"][group]
        for name, what in plan[group].items()
    ]
    return Design(tuple(pieces), plan["base_seed"], plan["cost"], file.parent / "study.yaml")


@dataclass(frozen=True)
class Cost:
    """The cost of a piece: steps of training, evaluations and merges by its plan, and seconds of one core."""

    steps: int
    evaluations: int
    merges: int
    seconds: float

    def minutes(self, cost: Mapping[str, Any]) -> float:
        """Minutes on `CORES` cores, the start of the run included."""
        return (self.seconds / CORES + float(cost["start"])) / 60


def cost_of(piece: Piece, design: Design) -> Cost:
    """The cost by the plan of the piece with the base that ships for its model. Raises UserError, as for missing data."""
    settings = design.overrides(piece, MODELS / piece.model)
    plan = Workspace.of(load_study(design.study, settings), Path("runs/when_ema/plan"), provisional=True).plan
    counts = dict.fromkeys(("train", "merge", "evaluate"), 0)
    steps = 0
    for step in plan.steps.values():
        counts[step.kind] += 1
        steps += step.spec["steps"] if step.kind == "train" else 0
    price = design.cost
    seconds = (
        steps * price["step"][piece.model]
        + counts["evaluate"] * price["evaluation"][piece.model]
        + counts["merge"] * price["merge"]
    )
    return Cost(steps, counts["evaluate"], counts["merge"], float(seconds))
