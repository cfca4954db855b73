"""Assumptions of the benchmarks: a silent server never answers, and a result records its circumstances."""

import io
import itertools
import json
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from merge_service import techniques
from tests.world import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import record
from arrivals import Opened, Stream, streaming
from jobs import excerpt
from tracker_down import silent


def test_benchmark_of_a_card_needs_torch_numpy_and_safetensors_alone() -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "open_clip", "pydantic", "PIL", "webdataset", "torchvision", "mlflow", "deepspeed", "numba", "llvmlite"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, "benchmarks")
import json
import gpu
print(gpu._share([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0)]), sorted(dict(gpu.Clip(32).named_children())))
print(json.dumps(gpu.merges("cpu", "micro", 3, 1, float("inf"))["techniques"]))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, *_, last = answer.stdout.splitlines()
    assert first.split(maxsplit=1) == [str(4 / 6), "['image', 'patches', 'text', 'words']"]
    rows = json.loads(last)
    assert rows["slerp"] == {"left_out": "needs llvmlite"}
    assert all(rows[name]["same_bytes"] for name in ("average", "task_arithmetic", "magmax"))


def test_silent_server_accepts_and_never_answers() -> None:
    with silent() as (address, taken):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(1)
            assert len(taken) == 1


def test_result_states_commit_machine_and_versions_and_keeps_the_values_of_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", [str(ROOT / "benchmarks" / "plan.py"), "--json", str(tmp_path / "one.json")]
    )
    record.save(tmp_path / "one.json", {"tasks": 3}, {"cpu": [0.12345678, 2]}, mergekit={"mergekit": "1.0"})
    found = json.loads((tmp_path / "one.json").read_text())
    assert found["command"] == ["python", "benchmarks/plan.py", "--json", "one.json"]
    assert (found["settings"], found["found"]) == ({"tasks": 3}, {"cpu": [0.123457, 2]})
    assert len(found["commit"]) == 40 and found["versions"]["mergekit"] == {"mergekit": "1.0"}
    assert 0 <= found["machine"]["cores_used_by_others"] <= found["machine"]["cores"]
    record.save(None, {}, {})


def test_files_that_an_arrival_opens_are_seen_only_below_its_folder_and_while_it_is_watched(
    tmp_path: Path,
) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    opened = Opened(inside)
    (inside / "before").write_text("")
    with opened.watch():
        (inside / "during").write_text("")
        outside.write_text("")
    assert {Path(path).name for path in opened.paths} == {"during"}


def test_arrival_reads_and_writes_what_the_one_before_did_but_for_a_name_whatever_the_technique(
    tmp_path: Path,
) -> None:
    """It ends the process where an arrival opens a file that is neither the base, the expert nor the state."""
    opened, states = Opened(tmp_path), []
    for technique in streaming():
        stream = Stream(technique, "micro", 1, tmp_path / technique, opened)
        found = [stream.arrive() for _ in range(4)]
        for key in ("read", "written"):
            grown = [later[key] - earlier[key] for earlier, later in itertools.pairwise(found[1:])]
            assert all(0 < one < 64 for one in grown), (technique, key, grown)
        checkpoint = stream.base.stat().st_size
        states.append(4 * (found[1]["read"] - 2 * checkpoint) / checkpoint)
    merging, readme = (
        " ".join((ROOT / page).read_text().split()) for page in ("docs/merging.md", "README.md")
    )
    assert f"{min(states):.0f} to {max(states):.0f} bytes per parameter of a float32 base" in merging
    assert "Most techniques keep exact streaming state" in readme
    every = [techniques.get(name) for name in techniques.names()]
    assert 2 * sum("stream" in one.forms for one in every) > len(every)


def test_excerpt_holds_so_many_samples_of_each_dataset_spread_over_its_test_split(tmp_path: Path) -> None:
    (tmp_path / "whole" / "a" / "test").mkdir(parents=True)
    (tmp_path / "whole" / "a" / "classnames.txt").write_text("one\ntwo\n")
    with tarfile.open(tmp_path / "whole" / "a" / "test" / "0.tar", "w") as tar:
        for number in range(10):
            for kind in ("png", "cls"):
                member = tarfile.TarInfo(f"{number:04}.{kind}")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % number))
    out = excerpt(tmp_path / "whole", ["a"], 2, tmp_path / "part")
    with tarfile.open(out / "a" / "test" / "0.tar") as tar:
        assert tar.getnames() == ["0000.png", "0000.cls", "0005.png", "0005.cls"]
    assert (out / "a" / "classnames.txt").read_text() == "one\ntwo\n"
