"""Merges whose result is an adapter, and adapters out of fine-tuned models, as the command line asks for them.

Invariant: an input is never overwritten, and an existing folder is replaced only if that was asked for.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_service.errors import UserError
from pipeline.merging.files import Execution, FileMerge, merge_files, refuse_to_replace

if TYPE_CHECKING:
    from merge_service.merging import Written


def merge_to_adapter(
    what: FileMerge, rank: int | None, how: Execution = Execution(), knots: bool = False
) -> "Written":
    """Merge into an adapter of the base, in the folder `what.out`: without a rank by factors side by side, which is exact and needs
    adapters and a linear technique; with a rank the nearest adapter of the merged model, which lies beside the output meanwhile.

    With `knots` adapters are merged in a basis that they share, by any technique. Raises UserError for options that an adapter has not.
    """
    from merge_service.merging import concatenate, extract, merge_in_shared_basis
    from merge_service.timelines import translate_merge

    if what.base is None:
        raise UserError("an adapter is a difference from a base; give it (--base)")
    unused = {"--dtype": what.dtype, "--shard-size": how.shard_size, "--as-study": what.as_study}
    wrong = next((option for option, value in unused.items() if value), None)
    if wrong is not None:
        raise UserError(f"--out-adapter writes float32 factors in one file; leave {wrong} out")
    _check_folder(what.out, [what.base, *what.experts], what.replace)
    if knots and rank is not None:
        raise UserError("--knots gives the rank of all updates together, exactly; leave --rank out")
    if rank is None:
        params = translate_merge(what.technique, dict(what.params), what.parity, len(what.experts))
        if knots:
            return merge_in_shared_basis(what.technique, params, what.base, what.experts, what.out, what.ids)
        return concatenate(what.technique, params, what.base, what.experts, what.out)
    parent = what.out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=parent) as room:
        whole = Path(room) / "merged.safetensors"
        report = merge_files(replace(what, out=whole, dtype="float32"), how)
        made = extract(whole, what.base, rank, what.out, any_base=True, name="the merged model")
        return replace(made, notes=(*report.notes, *made.notes))


def extract_adapter(finetuned: Path, base: Path, rank: int, out: Path, force: bool = False) -> "Written":
    """The adapter of a rank that brings the base nearest to a fine-tuned model, in the folder `out`."""
    from merge_service.merging import extract

    _check_folder(out, [base, finetuned], force)
    return extract(finetuned, base, rank, out)


def _check_folder(out: Path, inputs: list[Path], may_replace: bool) -> None:
    from merge_service.checkpoints import overwrites

    if out.name.endswith((".safetensors", ".json")):
        raise UserError(f"an adapter is a folder with two files; give a folder in the place of {out}")
    for path in inputs:
        if overwrites(out, path):
            raise UserError(f"{out} is one of the inputs and would be lost; give another folder")
    if not may_replace:
        refuse_to_replace(out)
