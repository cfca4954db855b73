"""Merges whose statistics are of all experts together and of no use to another merge: measured into a temporary directory.

Invariant: the merge itself is an ordinary one over the files.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_service.errors import UserError
from merge_service.techniques import get
from pipeline.merging.files import FileMerge, merge_files

if TYPE_CHECKING:
    from merge_service.merge import MergeReport

What = tuple[str, Mapping[str, Any], Path | None, Sequence[Path], Path]
"""Technique, parameters, base, experts, out."""
MEASURING = ("examples", "seed", "precision", "device", "model")
"""Parameters of the measurement, beside those of the technique."""


def merge_together(
    what: What, inputs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> "MergeReport":
    """Measure, then merge. `inputs` has the arrays of every expert's task. Raises UserError, also for a technique that does not measure
    so.
    """
    from workers.evidence.asked import Asked, Inputs
    from workers.evidence.layerwise import Experts, measure_layerwise

    name, given, base, experts, out = what
    technique = get(name)
    if not any(one.of == "experts" for one in technique.evidence):
        raise UserError(
            f"{name} takes no inputs; measure each expert (tm.measure) and give the files as statistics, if it needs any"
        )
    measuring = {key: value for key, value in given.items() if key in MEASURING}
    params = {key: value for key, value in given.items() if key not in MEASURING}
    resolved = technique.resolve(params, "merge", strict=True)
    config = measuring.pop("model", None)
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as place:
        asked = Asked("gram", **measuring)
        arrays = [Inputs.of(one) for one in inputs]
        files = measure_layerwise(Experts(experts, arrays, resolved, config), asked, Path(place))
        return merge_files(FileMerge(name, params, base, experts, out, statistics=files, **options))
