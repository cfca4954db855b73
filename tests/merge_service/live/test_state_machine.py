"""The state of a service under any interleaving of its worker and of what people ask: what must hold after every entry."""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from merge_service.live import (
    FINAL,
    KINDS,
    LATE,
    Admitted,
    Batched,
    BrokenLog,
    Data,
    Draft,
    Entry,
    Evaluated,
    Halved,
    Held,
    Known,
    Lane,
    Merged,
    Note,
    Promoted,
    Quarantined,
    Received,
    Refused,
    Rejected,
    Removed,
    Replaced,
    RolledBack,
    Scored,
    ServiceStarted,
    State,
    Verdict,
    Version,
    Waiting,
    apply,
    chained,
    entry_of,
    fold,
    in_turn,
    indexed,
    link,
    next_task,
    of_plain,
    parse,
    plain,
    purge,
    receive,
    reject,
    release,
    remove,
    roll_back,
    served_after,
)
from merge_service.timelines import Strategy

STRATEGY = Strategy("ema", "ema", "average")
BASE = Version(0, "base", "base-sha")


class Service:
    """A worker without files: it makes versions up from chains."""

    def __init__(self, rules: Lane = Lane()) -> None:
        self.rules = rules
        self.state, self.entries = State(), list[Entry]()
        self.say(Draft(ServiceStarted("toy", BASE, plain(STRATEGY), 1)))

    def say(self, draft: Draft | Known | None) -> None:
        if isinstance(draft, Draft):
            entry = entry_of(draft, self.state.seq + 1, self.state.head, 0)
            self.state = apply(self.state, entry)
            self.entries.append(entry)

    def version(self, t: int) -> Version:
        return made(self.state, t)

    def work(self, fate: int) -> None:
        """One step of a worker; `fate` says what it finds."""
        task, state = next_task(self.state, self.rules, fate), self.state
        if task is None:
            return
        if task.what == "make":
            assert state.asked is not None
            self.say(Draft(RolledBack(self.version(task.t), state.asked.hold, "")))
        elif task.what == "refold":
            removal = state.removal
            assert removal is not None
            if fate % 4 == 0 and not removal.force:
                self.say(Draft(Rejected(("regression.x",), ""), task.arrival))
            else:
                newest, served = self.version(state.t), self.version(served_after(state))
                self.say(
                    Draft(Promoted(newest, None, True, None if served == newest else served), task.arrival)
                )
        else:
            self.say(Draft(self.found(task.what, task.arrival, fate), task.arrival))

    def found(self, what: str, name: str, fate: int) -> Data:
        state, arrival = self.state, self.state.arrivals[name]
        if what == "check":
            refused = (
                Quarantined(("solo.no_gain",), ""),
                Quarantined(("format.corrupt",), ""),
                Held(("geometry.x",), ""),
            )
            return (
                refused[fate % 3]
                if fate % 7 < 2 and not arrival.waived
                else Admitted(f"e-{arrival.sha256}", {})
            )
        if what == "wait":
            return Waiting("order.waits_for.another")
        if what == "late":
            return Held((LATE,), "")
        if what == "merge":
            place = (
                arrival.replaces
                if arrival.replaces and state.arrivals[arrival.replaces].status == "accepted"
                else None
            )
            line = [one.id for one in in_turn(state, self.rules, fate) if not one.replaces]
            also = (
                ()
                if place or name not in line[:1]
                else tuple(line[1 : min(self.rules.batch, arrival.most or 9)])
            )
            if also != arrival.batch:
                return Batched(also)
            digests = [one.sha256 for one in state.sequence]
            if place:
                digests[[one.arrival for one in state.sequence].index(place)] = arrival.sha256
            else:
                digests += [arrival.sha256, *(state.arrivals[one].sha256 for one in arrival.batch)]
            return Merged(version_of(state.root, digests), state.chain, place)
        if what == "evaluate":
            return Evaluated(Scored("ev", {}, 0.5, None, None, None), (Verdict("drift", "pass", 0, 0, 0, 0),))
        assert arrival.candidate is not None
        if arrival.batch and (fate % 5 < 2 or state.on_hold):
            return Halved((len(arrival.batch) + 2) // 2, "")
        if fate % 5 == 0:
            return Rejected(("regression.x",), "")
        if fate % 5 == 1 or state.on_hold:
            return Held(("undecided.x",), "")
        if arrival.place:
            return Replaced(arrival.place, arrival.candidate, arrival.scored)
        return Promoted(arrival.candidate, arrival.scored)


def version_of(root: str, digests: list[str]) -> Version:
    chain = root
    for one in digests:
        chain = link(chain, one)
    return Version(len(digests), f"f{chain[:20]}", f"s{chain[:20]}") if digests else BASE


def made(state: State, t: int) -> Version:
    return version_of(state.root, [one.sha256 for one in state.sequence[:t]])


Ask = Callable[[Service, int], None]


def arrive(service: Service, number: int) -> None:
    state = service.state
    known = list(state.arrivals)
    replaces = known[number % len(known)] if known and number % 5 == 0 else None
    if replaces and state.arrivals[replaces].status != "accepted":
        replaces = None
    seq = state.seq if number % 2 and state.t else None
    data = Received(
        f"task{number % 4}", f"x{number}", 1, "base", "me", init_seq=seq, key=f"k{number % 50}", body=f"{number}",
        replaces=replaces,
    )  # fmt: skip
    service.say(receive(state, data, "me"))


def pick(service: Service, number: int) -> str:
    names = list(service.state.arrivals)
    return names[number % len(names)] if names else "a-000000"


def take_out(service: Service, number: int) -> None:
    what = ("none", "keep", "remove", "retrain")[number % 4]
    data = Removed("asked", number % 3 == 0, what)  # type: ignore[arg-type]
    service.say(remove(service.state, STRATEGY, pick(service, number), data, "op"))


ASKS: dict[str, Ask] = {
    "arrive": arrive,
    "work": lambda service, number: service.work(number),
    "release": lambda service, number: service.say(release(service.state, pick(service, number), "", "op")),
    "reject": lambda service, number: service.say(reject(service.state, pick(service, number), "", "op")),
    "roll_back": lambda service, number: service.say(
        roll_back(service.state, number % (service.state.t + 2), "", "op", number % 3 == 0)
    ),
    "remove": take_out,
    "purge": lambda service, number: service.say(
        purge(service.state, STRATEGY, pick(service, number), "", "op")
    ),
    "note": lambda service, number: service.say(Draft(Note("x"))),
}
TASKS = ("task2", "task0", "task3", "task1")
RULES = (Lane(), Lane(batch=3), Lane(TASKS), Lane(TASKS, 1), Lane(TASKS, 30, 2))
SCRIPTS = st.lists(
    st.tuples(st.sampled_from(["arrive", "work", "work", "work", "work", *ASKS]), st.integers(0, 60)),
    max_size=120,
)


def check(state: State) -> None:
    """What holds after every entry."""
    for t, one in enumerate(state.sequence, 1):
        arrival = state.arrivals[one.arrival]
        assert (arrival.status, arrival.t) == ("accepted", t)
        assert one.chain == link(state.sequence[t - 2].chain if t > 1 else state.root, one.sha256)
        assert one.version.fingerprint in ("", made(state, t).fingerprint) and one.version.t == t
    placed = {one.arrival for one in state.sequence}
    assert placed == {name for name, one in state.arrivals.items() if one.status == "accepted"}
    assert all((one.t is not None) == (name in placed) for name, one in state.arrivals.items())
    if state.removal is None:
        assert (state.served.fingerprint, state.served.sha256) == (
            made(state, state.served.t).fingerprint,
            made(state, state.served.t).sha256,
        )
        shown = [state.shown(one.arrival) for one in state.sequence]
        assert shown.count("promoted") == (state.served.t > 0)
    assert not {one.sha256 for one in state.sequence} & state.denied.keys()
    made_anew = indexed(state)
    assert made_anew == state and [*made_anew.index.incoming] == [*state.index.incoming]


@settings(max_examples=300, deadline=None)
@given(SCRIPTS, st.sampled_from(RULES))
def test_any_interleaving_keeps_the_state_whole_and_ends_when_nothing_is_asked(
    script: list[tuple[str, int]], rules: Lane
) -> None:
    service = Service(rules)
    for what, number in script:
        before = service.state
        try:
            ASKS[what](service, number)
        except Refused:
            assert service.state is before
        check(service.state)
    for _ in range(12 * len(service.state.arrivals) + 12):
        service.work(2)
        check(service.state)
    assert next_task(service.state, rules, 2) is None
    left = {"waiting"} if rules.order else set()
    assert all(one.status in FINAL | left for one in service.state.arrivals.values())
    assert fold(chained(service.entries)) == service.state
    assert of_plain(State, plain(service.state)) == service.state
    assert [parse(entry.text, "here") for entry in service.entries] == service.entries


@settings(max_examples=60, deadline=None)
@given(SCRIPTS, st.data())
def test_entries_in_any_other_order_are_refused(script: list[tuple[str, int]], data: st.DataObject) -> None:
    service = Service()
    for what, number in script:
        with contextlib.suppress(Refused):
            ASKS[what](service, number)
    entries = service.entries
    if len(entries) < 2:
        return
    at = data.draw(st.integers(0, len(entries) - 2))
    for changed in (
        [*entries[:at], entries[at + 1], entries[at], *entries[at + 2 :]],
        [*entries[:at], *entries[at + 1 :]],
        [*entries[: at + 1], entries[at], *entries[at + 1 :]],
    ):
        with pytest.raises(BrokenLog, match=r"log entry \d+"):
            list(chained(changed))
        with pytest.raises(BrokenLog):
            fold(changed)


def test_every_kind_of_entry_has_a_text_that_comes_back() -> None:
    made_up = {str: "x", int: 3, float: 0.5, bool: True}
    for kind in KINDS.values():
        values = {}
        for one in dataclasses.fields(kind):
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                values[one.name] = _value(str(one.type), made_up)
        entry = entry_of(Draft(kind(**values), "a-000001"), 5, "0" * 64, 1)
        assert parse(entry.text, "here") == entry
        for wrong in (
            b'{"kind":"x"}',
            entry.text[:-9],
            entry.text.replace(b'"seq":5', b'"seq":6'),
            b"[]",
            b"\xff",
        ):
            with pytest.raises(BrokenLog, match="here"):
                parse(wrong, "here")


def _value(annotation: str, made_up: dict[type, object]) -> object:
    if annotation.startswith(("tuple", "<class 'tuple", "tuple[")):
        return ()
    if "Mapping" in annotation:
        return {}
    if "Version" in annotation:
        return BASE
    if "Scored" in annotation:
        return None
    if "Literal" in annotation:
        return "reader"
    name = annotation.removeprefix("<class '").removesuffix("'>")
    return next((value for kind, value in made_up.items() if kind.__name__ == name), "x")


@pytest.mark.parametrize(
    "change, text",
    [
        (partial(dataclasses.replace, seq=9), "log entry"),
        (partial(dataclasses.replace, prev="1" * 64), "log entry"),
    ],
)
def test_entry_that_does_not_follow_is_named(change: Callable[[Entry], Entry], text: str) -> None:
    service = Service()
    entry = entry_of(Draft(Note("x")), 2, service.state.head, 0)
    with pytest.raises(BrokenLog, match=text):
        apply(service.state, change(entry))
