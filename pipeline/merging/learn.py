"""Learns the coefficients of a merge on arrays, for Python (`tm.learn`).

Invariant: as of `pipeline.api`, importing this loads no torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import speaks_python

if TYPE_CHECKING:
    from workers.learning.learn import Learned


@speaks_python
def learn(
    method: str,
    experts: Sequence[Path | str],
    inputs: Sequence[Mapping[str, Any]],
    *,
    base: Path | str,
    out: Path | str | None = None,
    **params: Any,
) -> "Learned":
    """Learn the coefficients of a merge on images of its tasks (`temporal-merge learn`); `merge(technique, ..., coefficients=out)` follows.

    `method` is adamerging, supermerge, dam, concrete, concrete_safe or tinting. `inputs` has the arrays of every task, as those of
    `measure`: images; labels [N] for supermerge; head, frozen class embeddings [C, d], or tokens [C, context] of one prompt per class,
    which the merged text tower embeds (always with towers=both). Class scores are at the temperature of `base`, which is never learned.
    `params` are the method's (docs/learned.md); `warm_start`, coefficients learned before; `model`, the architecture of a base without
    a configuration beside it; `every`, steps between checkpoints, from which a call with the same arguments goes on. Returns the
    coefficients by name, with `losses`, and writes them to `out`. Raises UserError.
    """
    from workers.evidence.asked import Inputs
    from workers.learning.learn import Where
    from workers.learning.learn import learn as learned
    from workers.learning.wanted import Wanted

    warm, config, every = params.pop("warm_start", None), params.pop("model", None), params.pop("every", 50)
    wanted = Wanted.of(method, params)
    files = [Path(one) for one in experts]
    where = Where(
        files,
        Path(base),
        None if out is None else Path(out),
        config,
        None if warm is None else Path(warm),
        every,
    )
    return learned(wanted, where, [Inputs.of(one) for one in inputs])
