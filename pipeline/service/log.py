"""The log of a service: entries that are created one after another and never changed, and the state that they make.

Layout below the service: `log/<12 digits>.json`, one file an entry; `log/sealed/<first>-<last>.jsonl`, 512 entries of the same chain in
one file, after which their own files go; `log/snapshot.json`, the state after some entry, a cache.

Creating entry n + 1 is the compare-and-swap: of two writers one succeeds, and the other reads what is new and decides again. There is
no leader and no clock. A sealed segment counts for its entries, so a file that a stalled writer creates under a sealed number is not an
entry, and its writer finds that out before it answers.

Invariant: an entry that `append` returned is on disk for ever. A log that is not the chain of what was written raises `BrokenLog`, which
names the entry; a damaged snapshot is made again.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from merge_service.faults import point
from merge_service.live import (
    DIGITS,
    GENESIS,
    BrokenLog,
    Draft,
    Entry,
    Index,
    State,
    apply,
    canonical,
    chained,
    digest,
    entry_of,
    indexed,
    of_plain,
    parse,
    plain,
)
from pipeline.service.shelf import Shelf

SEGMENT, SNAPSHOT_EVERY = 512, 256
LOG, SEALED, SNAPSHOT = "log", "log/sealed", "log/snapshot.json"

Decide = Callable[[State], Draft | None]


class Log:
    """The log on a shelf. `state` is that of the newest entry that was read; several threads may append."""

    def __init__(self, shelf: Shelf, state: State = State(), now: Callable[[], float] = time.time) -> None:
        self.shelf, self._state, self._now = shelf, state, now
        self._lock = threading.RLock()

    @classmethod
    def open(cls, shelf: Shelf, now: Callable[[], float] = time.time) -> "Log":
        """The log with its whole chain checked. Raises `BrokenLog`."""
        log = cls(shelf, now=now)
        kept = log._kept()
        head, last, after = GENESIS, 0, log._state
        for entry in chained(log.entries()):
            head, last = entry.sha256, entry.seq
            if kept is not None and entry.seq < kept.seq:
                continue
            if kept is not None and entry.seq == kept.seq:
                if entry.sha256 != kept.head:
                    kept, after = None, log._folded(entry.seq)  # the snapshot is of another log
                else:
                    after = kept
                continue
            after = apply(after, entry)
        if kept is not None and last < kept.seq:
            raise BrokenLog(
                f"{shelf.where}: the log ends at entry {last}, but its state after entry {kept.seq} was kept: the entries from "
                f"{last + 1} on were removed"
            )
        assert after.head == head
        log._state = after
        return log

    @property
    def state(self) -> State:
        """The state after the newest entry that was read."""
        return self._state

    def now_ms(self) -> int:
        """Unix time in milliseconds, by the clock of the entries."""
        return int(self._now() * 1000)

    def refresh(self) -> State:
        """Read what is new. Raises `BrokenLog`."""
        with self._lock:
            while (entry := self._read(self._state.seq + 1)) is not None:
                self._state = apply(self._state, entry)
            return self._state

    def append(self, decide: Decide) -> Entry | None:
        """Append what `decide` makes of the newest state; None if it wants nothing. When this returns the entry is durable.

        `decide` is called again whenever another writer was first. Raises `BrokenLog` for an entry that the state does not allow,
        and what `decide` raises.
        """
        with self._lock:
            while True:
                state = self.refresh()
                draft = decide(state)
                if draft is None:
                    return None
                entry = entry_of(draft, state.seq + 1, state.head, self.now_ms())
                after = apply(state, entry)
                point("log.before_append")
                if self._create(entry):
                    point("log.after_append")
                    self._state = after
                    self._keep_up(after)
                    return entry

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """Every entry that is numbered above `after`, in order; what a seal has left behind is passed over."""
        sealed = 0
        for key in self.shelf.keys(SEALED):
            first, last = _range(key)
            if last > after:
                yield from (entry for entry in self._segment(key, first, last) if entry.seq > after)
            sealed = max(sealed, last)
        for key in self.shelf.keys(LOG):
            number = key.rpartition("/")[2].removesuffix(".json")
            if number.isdigit() and int(number) > max(sealed, after):
                text = self.shelf.read(key)
                if text is not None:
                    yield self._parsed(text, key, int(number))

    def tidy(self) -> None:
        """Finish what a writer that ended early has left: segments to seal, and files of sealed entries."""
        with self._lock:
            for first in range(1, self.refresh().seq - SEGMENT + 2, SEGMENT):
                if not self.shelf.has(_segment(first)):
                    self._seal(first)
            for key in self.shelf.keys(LOG):
                number = key.rpartition("/")[2].removesuffix(".json")
                if number.isdigit() and self.shelf.has(_segment(int(number))):
                    self.shelf.remove(key)

    def is_snapshot_sound(self) -> bool:
        """Whether the kept state, if there is one, is what its own digest says."""
        return not self.shelf.has(SNAPSHOT) or self._kept() is not None

    def _create(self, entry: Entry) -> bool:
        key = _single(entry.seq)
        if not self.shelf.create(key, entry.text):
            return False
        if self.shelf.has(_segment(entry.seq)):  # others have long gone on; this file is no entry
            self.shelf.remove(key)
            return False
        return True

    def _read(self, seq: int) -> Entry | None:
        """One entry, from its segment if that is sealed."""
        first = _first(seq)
        if self.shelf.has(_segment(seq)):
            return self._segment(_segment(seq), first, first + SEGMENT - 1)[seq - first]
        text = self.shelf.read(_single(seq))
        if text is None:
            if self.shelf.has(_segment(seq)):  # sealed between the two looks
                return self._read(seq)
            return None
        return self._parsed(text, _single(seq), seq)

    def _parsed(self, text: bytes, key: str, seq: int) -> Entry:
        entry = parse(text, f"{self.shelf.where}/{key}")
        if entry.seq != seq:
            raise BrokenLog(f"{self.shelf.where}/{key} holds log entry {entry.seq}; it was moved or replaced")
        return entry

    def _segment(self, key: str, first: int, last: int) -> list[Entry]:
        lines = (self.shelf.read(key) or b"").splitlines()
        if len(lines) != last - first + 1:
            raise BrokenLog(
                f"{self.shelf.where}/{key} holds {len(lines)} log entries, not {last - first + 1}"
            )
        return [self._parsed(line, f"{key}, line {at}", first + at - 1) for at, line in enumerate(lines, 1)]

    def _keep_up(self, state: State) -> None:
        if _is_kept(state.seq):
            self._write_snapshot(state)
        if state.seq % SEGMENT == 0:
            self._seal(state.seq - SEGMENT + 1)

    def _seal(self, first: int) -> None:
        """Write a segment, then remove the files of its entries. Whoever is second writes the same bytes."""
        numbers = range(first, first + SEGMENT)
        texts = [self.shelf.read(_single(seq)) for seq in numbers]
        if None in texts:
            return  # somebody else is sealing it
        self.shelf.write(_segment(first), b"".join(text for text in texts if text is not None))
        point("log.after_seal")
        for seq in numbers:
            self.shelf.remove(_single(seq))

    def _write_snapshot(self, state: State) -> None:
        bare = plain(replace(state, index=Index()))
        body = {"seq": state.seq, "head": state.head, "state": bare}
        point("snapshot.write")
        self.shelf.write(SNAPSHOT, canonical({**body, "sha256": digest(body)}))

    def _kept(self) -> State | None:
        """The state of the snapshot, if it is sound."""
        text = self.shelf.read(SNAPSHOT)
        try:
            body = json.loads(text or b"")
            stated = body.pop("sha256")
            state = of_plain(State, body["state"])
            sound = stated == digest(body) and (state.seq, state.head) == (body["seq"], body["head"])
            return indexed(state) if sound else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _folded(self, last: int) -> State:
        """The state after entry `last`, from the beginning."""
        state = State()
        for entry in chained(self.entries()):
            if entry.seq > last:
                break
            state = apply(state, entry)
        return state


def _is_kept(seq: int) -> bool:
    """Whether the state after an entry is kept: after ever more of them, since writing it takes as long as there are arrivals."""
    return seq % max(SNAPSHOT_EVERY, (1 << seq.bit_length()) // 8) == 0


def _first(seq: int) -> int:
    return (seq - 1) // SEGMENT * SEGMENT + 1


def _single(seq: int) -> str:
    return f"{LOG}/{seq:0{DIGITS}d}.json"


def _segment(seq: int) -> str:
    """The segment that an entry is sealed into."""
    first = _first(seq)
    return f"{SEALED}/{first:0{DIGITS}d}-{first + SEGMENT - 1:0{DIGITS}d}.jsonl"


def _range(key: str) -> tuple[int, int]:
    first, _, last = key.rpartition("/")[2].removesuffix(".jsonl").partition("-")
    return int(first), int(last)
