"""Folds that continue a state: moving averages of sufficient statistics, which the weights of a running model do not hold.

The state lies beside the running model, as NAME.state.safetensors, and names the experts in it; so does the model. A fold begins with
the first expert, which seeds the averages.

Invariant: a running model is continued only with the state that it was made from.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_service.checkpoints.adapters.opening import open_weights
from merge_service.engine.stream_state import METADATA_KEY, StreamState
from merge_service.errors import TechniqueError
from merge_service.merging.derivation import Derivation, Member, Out, Way
from merge_service.merging.intake import ID_LENGTH
from merge_service.merging.report import MergeReport
from merge_service.merging.streaming import States, advance


def state_beside(model: Path) -> Path:
    """Where the state of a running model is: NAME.state.safetensors."""
    name = model.name.removesuffix(".index.json").removesuffix(".safetensors")
    return model.with_name(f"{name}.state.safetensors")


def resume(derivation: Derivation, out: Out, way: Way = Way(), after: Path | None = None) -> MergeReport:
    """Fold the second member into the first: a running model with its state beside it, a state itself, or the first expert.

    The new state goes to `after`, by default beside `out`. Raises `TechniqueError` for a running model without its state, and what
    `advance` raises.
    """
    running, new = derivation.members
    name = derivation.operator.technique.name
    if derivation.base is None:
        raise TechniqueError(f"{name} folds with a state, which belongs to a base; give the base (--base)")
    after = after or state_beside(out.path)
    with contextlib.ExitStack() as stack:
        held = _held(running, derivation.base, name)
        if held is None:
            out.path.absolute().parent.mkdir(parents=True, exist_ok=True)
            beside = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".states-", dir=out.path.absolute().parent)
            )
            held = Path(beside) / "seed.safetensors"
            _advance(derivation, running, States(None, held), None, way)
        return _advance(derivation, new, States(held, after), out, way)


def _advance(
    derivation: Derivation, member: Member, states: States, out: Out | None, way: Way
) -> MergeReport:
    if member.id is None:
        with open_weights(member.path, derivation.base) as weights:
            content, sha256 = weights.digests()
        member = dataclasses.replace(member, id=content[:ID_LENGTH], sha256=sha256)
    return advance(dataclasses.replace(derivation, members=(member,)), states, out, way)


def _held(running: Member, base: Path | None, technique: str) -> Path | None:
    """The state of a running model; None for an expert, which begins a fold."""
    with open_weights(running.path, base) as model:
        record = _record(model.metadata.get(METADATA_KEY))
    if record is None:
        return None
    if "state" in record:
        return running.path
    beside = state_beside(running.path)
    if beside.is_file():
        with StreamState(beside) as state:
            if _ids(state.inputs) == _ids(record.get("inputs", [])) and record.get("technique") == technique:
                return beside
    raise TechniqueError(
        f"{technique} continues the state of a running model, and {running.path} is a merged model without it ({beside} is missing, or "
        "belongs to another model). Fold the experts from the first one on, or merge all of them at once"
    )


def _record(text: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(text or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _ids(inputs: Sequence[Mapping[str, str]]) -> list[str]:
    return [entry["id"] for entry in inputs]
