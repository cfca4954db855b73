"""Thresholds kept beside an expert: computed once, equal bytes with and without them, never used if they do not match."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import Checkpoint
from merge_service.engine import keep_thresholds, survey, thresholds_rule
from merge_service.engine.thresholds_cache import MOST, SUFFIX
from merge_service.merge import advance, fold, merge
from merge_service.merging import Member
from merge_service.merging.derivation import Derivation, Operator, Way
from merge_service.merging.stream import StreamCache
from merge_service.techniques import get
from tests.merge_service import toys

RULES = [
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "granularity": "tensor", "count_frozen": False}),
    ("breadcrumbs_ties", {"density": 0.5, "outliers": 0.1, "granularity": "model"}),
    ("ties", {"density": 0.3, "logit_scale": "base"}),
]


class Room:
    """A base and two experts of 20 000 numbers, and how often a merge has computed thresholds."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rng, self.path, self.questions = np.random.default_rng(5), path, 0
        self.model = {
            "w": rng.standard_normal(15_000),
            "visual.resblocks.0.v": rng.standard_normal(5_000),
            "logit_scale": np.ones(()),
        }
        self.model = {name: value.astype(np.float32) for name, value in self.model.items()}
        self.base = self.save("base", self.model)
        self.experts = [self.save(name, self.another(rng)) for name in ("one", "two")]
        answer = survey.Surveyor.answer

        def counted(surveyor, question):
            self.questions += 1
            return answer(surveyor, question)

        monkeypatch.setattr(survey.Surveyor, "answer", counted)

    def another(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {n: v + rng.standard_normal(v.shape).astype(np.float32) * 0.1 for n, v in self.model.items()}

    def save(self, name: str, model: dict[str, np.ndarray]) -> Path:
        return toys.save(self.path / f"{name}.safetensors", model)

    def merge(self, technique: str = "ties", params: dict | None = None, **options) -> bytes:
        out = self.path / "out.safetensors"
        self.report = merge(technique, params or {}, self.base, self.experts, out, **options)
        return out.read_bytes()

    def asked(self, work: Callable[[], object]) -> int:
        before = self.questions
        work()
        return self.questions - before

    def sidecar(self, number: int = 0) -> Path:
        return Path(f"{self.experts[number]}{SUFFIX}")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(tmp_path, monkeypatch)


@pytest.mark.parametrize(("technique", "params"), RULES)
def test_second_merge_asks_nothing_and_gives_the_same_bytes(room: Room, technique: str, params: dict) -> None:
    plain = room.merge(technique, params)
    assert not list(room.path.glob(f"*{SUFFIX}"))
    assert room.merge(technique, params, keep_thresholds=True) == plain and not room.report.notes
    assert len(list(room.path.glob(f"*{SUFFIX}"))) == 2
    assert room.asked(lambda: room.merge(technique, params)) == 0
    assert room.merge(technique, params) == plain


def test_one_file_serves_every_rule_that_was_asked_for(room: Room) -> None:
    for technique, params in RULES:
        room.merge(technique, params, keep_thresholds=True)
    for technique, params in RULES:
        assert room.asked(lambda t=technique, p=params: room.merge(t, p)) == 0
    assert len(json.loads(room.sidecar().read_text())["entries"]) == len(RULES)
    assert room.asked(lambda: room.merge("lines_ties", {"density": 0.3})) == 0  # thins out as ties does
    assert room.asked(lambda: room.merge("ties", {"density": 0.31})) > 0
    assert room.asked(lambda: room.merge("ties", {"density": 0.3, "granularity": "model"})) > 0


def test_advance_and_fold_use_and_write_what_is_kept(room: Room) -> None:
    room.merge(keep_thresholds=True)
    state, out = room.path / "s.safetensors", room.path / "o.safetensors"
    start = {"expert_id": "a", "state_in": None, "state_out": state}
    assert room.asked(lambda: advance("ties", {}, room.base, room.experts[0], out, **start)) == 0
    assert room.asked(lambda: fold("ties", {}, room.base, *room.experts, out)) == 0
    room.sidecar(1).unlink()
    fold("ties", {}, room.base, *room.experts, out, keep_thresholds=True)
    assert room.asked(lambda: room.merge()) == 0


def test_rewritten_expert_is_not_merged_with_the_old_thresholds(room: Room) -> None:
    room.merge(keep_thresholds=True)
    before = room.experts[0].stat()
    with Checkpoint.open(room.experts[0]) as expert:
        offset = expert.tensors["w"].offset
    raw = bytearray(room.experts[0].read_bytes())
    raw[offset + 8000 : offset + 8004] = np.float32(9).tobytes()  # between two samples: only the time tells
    room.experts[0].write_bytes(raw)
    os.utime(room.experts[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    kept = room.asked(lambda: room.merge())
    assert kept > 0
    changed = room.merge()
    room.sidecar().unlink()
    assert room.merge() == changed
    room.merge(keep_thresholds=True)
    assert room.asked(lambda: room.merge()) == 0


def test_any_tensor_that_changes_changes_the_identity(room: Room) -> None:
    with Checkpoint.open(room.base) as before:
        first = before.fingerprint()
    for name in room.model:
        for place in (0, -1):
            model = {n: v.copy() for n, v in room.model.items()}
            model[name].reshape(-1)[place] += 1
            with Checkpoint.open(room.save("other", model)) as other:
                assert other.fingerprint() != first, (name, place)


def test_sha256_decides_over_time_where_both_know_it(room: Room) -> None:
    ids, known = ["one", "two"], {"one": "aa" * 32, "two": "bb" * 32}
    room.merge(keep_thresholds=True, ids=ids, sha256=known)
    for path in room.experts:
        os.utime(path, (1, 1))
    assert room.asked(lambda: room.merge(ids=ids, sha256=known)) == 0
    assert room.asked(lambda: room.merge(ids=ids)) > 0
    assert room.asked(lambda: room.merge(ids=ids, sha256=known | {"one": "cc" * 32})) > 0


def test_another_base_has_thresholds_of_its_own(room: Room) -> None:
    plain = room.merge(keep_thresholds=True)
    first, room.base = room.base, room.save("moved", room.another(np.random.default_rng(6)))
    assert room.asked(lambda: room.merge(keep_thresholds=True)) > 0
    assert room.asked(lambda: room.merge()) == 0
    room.base = first
    assert room.asked(lambda: room.merge()) == 0 and room.merge() == plain


def _edit(change: Callable[[dict], object], *, sign: bool = True) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        body = json.loads(content)
        change(body)
        if sign:
            body.pop("content_sha256")
            body["content_sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps(body).encode()

    return damage


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not an object": lambda content: b"[1, 2]",
    "nested without end": lambda content: b"[" * 100_000,
    "other version": _edit(lambda body: body.update(format=0)),
    "altered number": _edit(
        lambda body: body["entries"][0]["limits"].update(
            {k: ["0x1p-3", "inf"] for k in body["entries"][0]["limits"]}
        ),
        sign=False,
    ),
    "no number": _edit(
        lambda body: body["entries"][0]["limits"].update({k: [1] for k in body["entries"][0]["limits"]})
    ),
    "group missing": _edit(lambda body: body["entries"][0]["limits"].popitem()),
    "no entries": _edit(lambda body: body.update(entries=None)),
    "entries of nothing": _edit(lambda body: body.update(entries=[1, None, "x", {}])),
    "no identity": _edit(lambda body: body.update(expert={})),
}


@pytest.mark.fault("F15")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_passed_over_and_written_anew(room: Room, damage: str) -> None:
    plain = room.merge(keep_thresholds=True)
    room.sidecar().write_bytes(DAMAGE[damage](room.sidecar().read_bytes()))
    assert room.asked(lambda: room.merge()) > 0 and room.merge() == plain
    assert room.merge(keep_thresholds=True) == plain and not room.report.notes
    assert room.asked(lambda: room.merge()) == 0


def test_place_that_cannot_be_written_is_told_and_no_error(room: Room) -> None:
    plain = room.merge()
    room.sidecar().mkdir()
    assert room.merge(keep_thresholds=True) == plain
    (note,) = room.report.notes
    assert "thresholds were not kept" in note and str(room.sidecar()) in note
    assert not [path for path in room.path.iterdir() if path.name.endswith(".tmp")]
    blocked = room.path / "file"
    blocked.write_text("")
    assert room.merge(keep_thresholds=blocked / "below") == plain and len(room.report.notes) == 2


def test_a_directory_of_their_own_leaves_the_experts_room_as_it_was(room: Room) -> None:
    kept = room.path / "limits"
    plain, before = room.merge(keep_thresholds=kept), set(room.path.iterdir())
    assert room.asked(lambda: room.merge(keep_thresholds=kept)) == 0
    assert room.merge() == plain and set(room.path.iterdir()) == before and len(list(kept.iterdir())) == 2


def test_many_writers_at_once_leave_a_file_that_is_whole(room: Room) -> None:
    def write(number: int) -> None:
        for step in range(4):
            keep_thresholds("ties", {"density": (1 + number + 3 * step) / 100}, room.base, room.experts[0])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    body = json.loads(room.sidecar().read_text())
    assert 1 <= len(body["entries"]) <= 12
    (density,) = {body["entries"][-1]["rule"]["density"]}
    room.experts = room.experts[:1]
    assert room.asked(lambda: room.merge(params={"density": density})) == 0


def test_file_does_not_grow_without_end(room: Room) -> None:
    for number in range(1, MOST + 10):
        keep_thresholds("ties", {"density": number / 200}, room.base, room.experts[0])
    assert len(json.loads(room.sidecar().read_text())["entries"]) == MOST


def test_limits_found_where_an_expert_is_made_serve_the_merge(room: Room) -> None:
    for path in room.experts:
        assert (
            keep_thresholds("ties", {"density": 0.4}, room.base, path, room.path / "kept", sha256=None) == ()
        )
    params = {"density": 0.4}
    plain = room.merge(params=params)
    assert room.asked(lambda: room.merge(params=params, keep_thresholds=room.path / "kept")) == 0
    assert room.merge(params=params, keep_thresholds=room.path / "kept") == plain


def test_techniques_without_thresholds_keep_nothing(room: Room) -> None:
    for technique, params in (("average", {}), ("dare_ties", {}), ("magmax", {}), ("ties", {"density": 1})):
        room.merge(technique, params, keep_thresholds=True)
        assert keep_thresholds(technique, params, room.base, room.experts[0]) == ()
    assert not list(room.path.glob(f"*{SUFFIX}"))
    assert thresholds_rule("average", get("average").resolve({}, "merge")) is None


def test_a_stream_uses_and_writes_what_is_kept(room: Room, tmp_path: Path) -> None:
    members = [Member(f"t{i}", path, f"{i}" * 64) for i, path in enumerate(room.experts)]
    caches = [StreamCache(tmp_path / f"s{i}", Way(keep_thresholds=tmp_path / "kept")) for i in range(2)]

    def run(cache: StreamCache) -> None:
        derivation = Derivation(Operator.of("ties", {}, "merge"), room.base, tuple(members))
        cache.merge(derivation, "base", tmp_path / "stream.safetensors")

    assert room.asked(lambda: run(caches[0])) > 0
    assert room.asked(lambda: run(caches[1])) == 0
