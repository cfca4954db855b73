"""The names of inputs as a text: what `json` would write, and states of before, whose metadata has them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from merge_service.checkpoints import sha256_of
from merge_service.engine.inputs import Inputs, spliced
from merge_service.engine.stream_state import METADATA_KEY, NAMES, StreamState
from merge_service.errors import CorruptCheckpoint, TechniqueError
from merge_service.merge import advance
from tests.merge_service import toys

entries = st.fixed_dictionaries(
    {"id": st.text(min_size=1)}, optional={"sha256": st.text(), "file": st.text()}
)


@given(st.lists(entries, max_size=5), st.integers(0, 5), st.text(min_size=1))
def test_inputs_however_put_together_are_the_text_that_json_gives(
    found: list[dict[str, str]], cut: int, other: str
) -> None:
    inputs = Inputs.of(found[:cut]).then(found[cut:])
    assert inputs.text == json.dumps(found, sort_keys=True)
    assert [*inputs] == found and len(inputs) == len(found)
    assert inputs.has(other) == (other in {one["id"] for one in found})
    record = {"technique": other, "inputs": inputs, "params": {"b": 1.5, "a": None}}
    assert spliced(record) == json.dumps({**record, "inputs": found}, sort_keys=True)


def as_before(state: Path, target: Path) -> Path:
    """A state as earlier versions wrote it: the names are in its metadata."""
    with safe_open(state, "np") as opened:
        said, arrays = opened.metadata(), load_file(state)
    names = json.loads(bytes(arrays.pop(NAMES)))
    record = {**json.loads(said[METADATA_KEY]), "state": 3, "inputs": names}
    save_file(arrays, target, {METADATA_KEY: json.dumps(record)})
    return target


def test_state_of_before_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    files, found = toys.Files(tmp_path), []
    first = tmp_path / "first.safetensors"
    advance("ties", {}, files.start, files.paths[0], None, expert_id="t1", state_in=None, state_out=first)
    for number, state in enumerate([first, as_before(first, tmp_path / "before.safetensors")]):
        with StreamState(state) as opened, pytest.raises(TechniqueError, match="already in"):
            opened.check_new("t1")
        after, out = tmp_path / f"after-{number}.safetensors", tmp_path / f"out-{number}.safetensors"
        advance("ties", {}, files.start, files.paths[1], out, expert_id="t2", state_in=state, state_out=after)
        found.append((sha256_of(after), sha256_of(out)))
    assert found[0] == found[1]


@pytest.mark.parametrize("names", [b"", b"[", b"\xff\xff", b"{}"])
def test_state_without_a_list_of_names_is_refused(names: bytes, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    save_file({NAMES: np.frombuffer(names, np.uint8)}, state, {METADATA_KEY: '{"state": 4}'})
    with pytest.raises(CorruptCheckpoint, match="not the state of a streaming merge"):
        StreamState(state)
