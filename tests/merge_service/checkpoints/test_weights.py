"""Any weights with named tensors are merged to the same bytes as a file of the same numbers, or refused alike."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint, Weights, admit, check_finite
from merge_service.engine.split import Source
from merge_service.errors import CheckpointError, IncompatibleCheckpoint, NonFiniteCheckpoint
from merge_service.merging.combine import combine, combine_weights
from merge_service.merging.derivation import Derivation, Operator, Out, Way, members_of
from tests.merge_service import toys
from tests.merge_service.views import Arrays, Permuted

TECHNIQUES = ("average", "ties", "lines_dare_ties", "sce", "random_mix", "multislerp", "iso_c")
"""The loops, ranks and elections, depth and masks, whole tensors, matrices."""


@pytest.fixture
def files(tmp_path: Path) -> toys.Files:
    return toys.Files(tmp_path)


def derivation(technique: str, files: toys.Files, paths: Sequence[Path] | None = None) -> Derivation:
    members = members_of(paths or files.paths, ["one", "two"], None)
    return Derivation(Operator.of(technique, {}, "merge"), files.start, members)


def merged(asked: Derivation, base: Weights, experts: Sequence[Weights], out: Path) -> bytes:
    combine_weights(asked, base, experts, Out(out))
    return out.read_bytes()


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_weights_in_memory_merge_to_the_bytes_of_their_files(technique: str, files: toys.Files) -> None:
    asked = derivation(technique, files)
    combine(asked, Out(files.out))
    for laid in (True, False):
        base, *experts = (Arrays(each, laid=laid) for each in (files.base, *files.experts))
        assert merged(asked, base, experts, files.room / "memory.safetensors") == files.out.read_bytes()


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_permuted_view_merges_to_the_bytes_of_the_permuted_file(technique: str, files: toys.Files) -> None:
    rng = np.random.default_rng(2)
    names = ("transformer.resblocks.1.mlp.weight", "visual.transformer.resblocks.0.attn.in_proj_weight")
    orders = {name: rng.permutation(len(files.base[name])) for name in names}
    written = {
        name: array[orders[name]] if name in orders else array for name, array in files.experts[1].items()
    }
    path = toys.save(files.room / "permuted.safetensors", written)
    asked = derivation(technique, files, [files.paths[0], path])
    combine(asked, Out(files.out))
    with contextlib.ExitStack() as stack:
        base, one, two = (stack.enter_context(Checkpoint.open(p)) for p in (files.start, *files.paths))
        found = merged(asked, base, [one, Permuted(two, orders)], files.room / "view.safetensors")
        plain = merged(asked, base, [one, two], files.room / "plain.safetensors")
    assert found == files.out.read_bytes() != plain


def test_thresholds_are_kept_of_files_alone(files: toys.Files) -> None:
    asked, way = derivation("ties", files), Way(keep_thresholds=True)
    order = np.arange(5)[::-1]
    with contextlib.ExitStack() as stack:
        base, one, two = (stack.enter_context(Checkpoint.open(p)) for p in (files.start, *files.paths))
        seen = Permuted(two, {"visual.ln_pre.bias": order})
        combine_weights(asked, base, [one, seen], Out(files.out), way)
        assert [path.name for path in files.room.glob("*.limits.json")] == ["e0.safetensors.limits.json"]
        combine_weights(asked, base, [one, two], Out(files.out), way)
        found = merged(asked, base, [one, seen], files.out)
    reordered = files.experts[1] | {"visual.ln_pre.bias": files.experts[1]["visual.ln_pre.bias"][order]}
    assert found == merged(
        asked, Arrays(files.base), [Arrays(files.experts[0]), Arrays(reordered)], files.out
    )


def test_admission_mends_and_refuses_weights_in_memory_as_it_does_files(files: toys.Files) -> None:
    base = Arrays(files.base, "base")
    wrapped = Arrays({f"module.{name}": array for name, array in files.experts[0].items()})
    assert admit(base, wrapped, "one") == ("one: its tensor names were read without their prefix 'module.'",)
    assert wrapped.tensors.keys() == base.tensors.keys()
    with pytest.raises(IncompatibleCheckpoint, match=r"one \(memory\) .*text_projection has shape \[2\]"):
        admit(base, Arrays(files.experts[0] | {"text_projection": np.ones(2, np.float32)}), "one")
    with pytest.raises(NonFiniteCheckpoint, match=r"text_projection has 1 of 12 values"):
        bad = files.experts[0]["text_projection"].copy()
        bad[1, 1] = np.nan
        check_finite(Arrays(files.experts[0] | {"text_projection": bad}), "one")


def test_numbers_that_are_not_finite_stop_a_merge_of_weights_in_memory(files: toys.Files) -> None:
    bad = {**files.experts[1], "visual.ln_pre.bias": np.full(5, np.inf, np.float32)}
    for laid in (True, False):
        base, one, two = (Arrays(each, laid=laid) for each in (files.base, files.experts[0], bad))
        with pytest.raises(NonFiniteCheckpoint, match=r"two .*visual\.ln_pre\.bias has 5 of 5"):
            merged(derivation("ties", files), base, [one, two], files.out)
    assert not files.out.exists()


def test_workers_are_refused_weights_that_they_cannot_open(files: toys.Files) -> None:
    with pytest.raises(
        CheckpointError, match=r"memory is not a checkpoint on disk, .* merge without --workers"
    ):
        Source.of(Arrays(files.base))
