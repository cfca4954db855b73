"""The loop that carries out a plan: ready steps go to free actors, and their results are recorded.

Invariant: the store alone says which steps are done; the driver reads it at the start, and an actor's answer only means
that the store has the artifact. So the same command, run again after any crash, continues from there.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cluster.capacity import Capacity
from cluster.code import CodeMismatch
from cluster.memory import OutOfMemory
from cluster.pool import Call, Group, PlaceLost, Pools, WorkerLost, wait
from cluster.session import ClusterError, Head, Session, check_address, connect, nodes_now
from merge_service.errors import UserError
from merge_service.faults import point
from merge_service.techniques import check_importable
from merge_service.techniques import get as technique_called
from pipeline.console import WARNING, complain
from pipeline.errors import CorruptArtifact, NondeterminismError, StepFailed, StepTimeout, StorageFull
from pipeline.files.disk import room_for
from pipeline.plan.steps import Step
from pipeline.run.carriers import CARRIERS, Lane
from pipeline.run.deadlines import Deadlines, why_waiting
from pipeline.run.events import Events
from pipeline.run.jobs import Jobs
from pipeline.run.keeping import Keeping, check_room, finish_keeping
from pipeline.run.lanes import Lanes
from pipeline.run.others import Others, other_versions
from pipeline.run.output import steady
from pipeline.run.progress import Progress, Standings, Tell, outlook
from pipeline.run.schedule import Schedule, ranks
from pipeline.run.timing.pace import pace_of
from pipeline.run.trace import Timeline
from pipeline.store.artifact import Record
from pipeline.store.lease import Holder
from pipeline.study.config import Study
from pipeline.tracking.session import Tracking
from pipeline.workspace.lock import Running, Waited, driver_lock, write_driver, write_last
from pipeline.workspace.registrations import retire
from pipeline.workspace.workspace import Beside, Workspace

TICK_SECONDS = 0.5
LOOK_SECONDS = 5.0
WAITING_SECONDS = 15.0
"""How long a new group may take to answer before this is reported; importing torch takes part of it."""
GRACE_SECONDS = 30.0
"""How long the driver waits for lost nodes to come back when no remaining step can be placed without them."""
IDLE_SECONDS = 60.0
"""How long an idle group is kept on a cluster with autoscaling."""
WAITED_SECONDS = 2.0
"""How long an idle group is kept while another driver carries out a step that this one needs."""
FATAL = (UserError, NondeterminismError, StorageFull, CodeMismatch)
"""Errors that another try cannot fix."""
MEMORY_RETRIES = 2
"""Retries after a lack of memory: other work on the machine may have caused it, but hardly three times."""


@steady()
def carry_out(
    study: Study, out: Path | None, address: str, *,
    strict_versions: bool = False, tell: Tell | None = None, beside: Beside = contextlib.nullcontext,
) -> tuple[Path, dict[str, object], Tracking]:  # fmt: skip
    """Run a study to its end, or from where it stopped. Returns OUT, the content of results.json, and the tracking.

    Writes nothing to stdout. `tell`, if given, is called on every change, instead of lines and a live view on stderr. `beside` is entered
    while steps run. With `strict_versions` artifacts of other library versions are refused. Raises UserError, StorageFull or StepFailed.
    """
    check_address(address)
    workspace = Workspace.of(study, out)
    for warning in workspace.study.warnings:
        complain("warning", warning, WARNING)
    steps = workspace.plan.steps.values()
    for name in {step.spec["technique"] for step in steps if "technique" in step.spec}:
        check_importable(technique_called(name))
    events = Events(workspace.out)
    with (
        driver_lock(workspace.out),
        _end_recorded(workspace, events),
        room_for(_name(workspace), workspace.out),
    ):
        events.add("start", f"{_name(workspace)} on {address}", pid=os.getpid())
        for warning in workspace.study.warnings:
            events.add("warning", warning)
        workspace.prepare()
        for note in workspace.notes:
            complain("note", note, WARNING)
            events.add("note", note)
        summary = workspace.summary()
        check_room(workspace, summary)
        done = workspace.done()
        if other := other_versions(workspace, done, strict_versions):
            complain("warning", other, WARNING)
            events.add("versions", other)
        tracking = Tracking(workspace)
        for note in tracking.notes:
            complain("note", note, WARNING)
            events.add("plan", note)
        print(outlook(summary), file=sys.stderr, flush=True)
        try:
            with tracking, beside(workspace):
                if len(done) < len(workspace.plan.steps):
                    Timeline(workspace.out).event("start", address=address)
                    with connect(address, threads=workspace.study.resources.experts.threads) as session:
                        _Drive(workspace, session, tracking, done, strict_versions, tell).run()
                results = workspace.write_results()
                for note in finish_keeping(workspace, results):
                    complain("note", note, WARNING)
                    events.add("note", note)
                tracking.finished(results)
        finally:
            workspace.tidy()
            retire(workspace.store, workspace.plan, workspace.out, workspace.kept)
        events.add("end", _ended(tracking))
    return workspace.out, results, tracking


@contextlib.contextmanager
def _end_recorded(workspace: Workspace, events: Events) -> Iterator[None]:
    """Record how a run ended, for `status`."""
    try:
        yield
    except BaseException as error:
        failed = isinstance(error, Exception)
        if failed and workspace.failure is None:
            workspace.failure = {"step": _name(workspace), "error": _first_line(error)}
        events.add("failed" if failed else "end", _first_line(error))
        raise
    finally:
        write_last(workspace.out, {"ended": True, "failed": workspace.failure})


class _Drive:
    """One run of a plan in one session."""

    def __init__(
        self,
        workspace: Workspace,
        session: Session,
        tracking: Tracking,
        done: set[str],
        strict_versions: bool = False,
        tell: Tell | None = None,
    ) -> None:
        self.workspace, self.tracking = workspace, tracking
        self.events = Events(workspace.out)
        self._trouble: str | None = None
        self.study, self.steps = workspace.study, workspace.plan.steps
        self.lanes = Lanes(self.study, {fp: step for fp, step in self.steps.items() if fp not in done})
        self.capacity = None if self.study.resources.autoscaling else Capacity(session.nodes)
        if self.capacity is not None:
            self.lanes.check(self.capacity)
        self.lanes.add(self.steps)
        self.schedule = Schedule(
            self.steps, done, self.lanes.of, ranks(workspace.plan, self.study.schedule.priority)
        )
        self.pools = Pools(self.lanes.pools(patient=self.capacity is None), self.capacity)
        self.keeping = Keeping(workspace, self.schedule.done)
        self.jobs = Jobs(workspace, self.keeping.held, self.keeping.reserve)
        self.timeline = Timeline(workspace.out)
        self.deadlines, self.head = Deadlines(self.study, workspace.scratch), Head()
        self.others = Others(workspace, strict_versions)
        self.running: dict[Call, Step] = {}
        self.counts: Counter[str] = Counter()
        self.tries: dict[str, int] = {}
        self.untold: list[tuple[Step, Record, float | None]] = []
        standings = Standings(workspace.plan)
        for record in filter(None, map(workspace.known, done)):
            standings.finished(record)
        pace = pace_of(self.steps, workspace.out)
        self.progress = Progress(pace, self.schedule.done, workspace.scratch, standings, tell=tell)
        self._checked, self._waiting = 0.0, dict[str, str]()
        self._unplaced_since: float | None = None
        self._began: dict[str, float] = {}
        self._written: tuple[list[Running], list[Waited]] = ([], [])
        self.timeline.event("ready", cores=session.cpus, gpus=session.gpus, nodes=len(session.nodes))

    def run(self) -> None:
        """Run until every step is done. Raises errors that another try cannot fix."""
        with self.others, self.progress, self.head, self.keeping, contextlib.ExitStack() as stack:
            stack.callback(self.pools.close)
            stack.callback(self._report)
            stack.callback(self._report_kept)
            while not self.schedule.finished:
                self._start_ready()
                self._write_state()
                self._report()
                if self.schedule.finished:  # other drivers have done the rest
                    break
                for call in wait(list(self.running), TICK_SECONDS):
                    self._complete(call)
                self._check_others()
                self._check_cluster()

    def _start_ready(self) -> None:
        """Start the most important steps that can be placed, until none is left.

        Nodes that will hold a more important step are kept free for it.
        """
        barred: set[str] = set()
        kept_clear: set[str] = set()
        while (best := self._best(barred)) is not None:
            fingerprint, lane = best
            group = self.pools.group(lane.pool, kept_clear)
            if group is None:
                barred.add(lane.name)
                if self.capacity is not None:
                    kept_clear |= self.capacity.reserved_for(lane.shape)
                continue
            if self._claim(self.steps[fingerprint]):
                self._start(self.steps[fingerprint], lane, group)

    def _best(self, barred: set[str]) -> tuple[str, Lane] | None:
        """The most important step of the lanes that are neither in `barred` nor at their cap; scores first while nothing ends later for it."""
        found, spare = [], self.schedule.has_spare_time(self.progress.pace.width[False])
        too_early = self.keeping.must_wait(self.running.values())
        for name in self.schedule.lanes - barred:
            lane = self.lanes.by_name[name]
            first = self.schedule.first(name)
            if first is not None and first[1] in too_early:
                continue
            of_kind = self.lanes.most_of(lane.kind)
            if (lane.cap is None or self.counts[name] < lane.cap) and (
                of_kind is None or self.counts[lane.kind] < of_kind
            ):
                found += [] if first is None else [(*first, lane)]
        if not found:
            return None
        early = {lane.name for *_, lane in found if spare and self.lanes.scores_beside_experts(lane)}
        return min(found, key=lambda entry: (entry[2].name not in early, *entry[:2]))[1:]

    def _claim(self, step: Step) -> bool:
        """Take a step to carry it out here. False if another driver carries it out or has done it."""
        found = self.others.take(step)
        if isinstance(found, Holder):
            text = f"{step.label}: waiting for {found}, which carries it out"
            self._note("waiting", text, about=step.fingerprint)
            self.schedule.start(step.fingerprint)
            self.progress.started(step.fingerprint, f"{step.label} (waiting for {found})")
        elif found is not None:
            self._found(step, found)
        return found is None

    def _found(self, step: Step, record: Record) -> None:
        """Record a step that another driver has done."""
        text = self.others.other_versions(record)
        if text:
            self._note("versions", text)
        self.progress.started(step.fingerprint, f"{step.label} (by another driver)")
        self._done(step, record, None)

    def _done(self, step: Step, record: Record, took: float | None) -> None:
        self.schedule.finish(step.fingerprint)
        self.keeping.finished(step)
        self.untold.append((step, record, took))

    def _check_others(self) -> None:
        """Check the steps that other drivers carry out: each is done, or free to be carried out here.

        Idle workers are dropped: on a shared cluster they may hold resources that another driver waits for.
        """
        if self.others.waits:
            self.pools.drop_idle(WAITED_SECONDS)
        for fingerprint, record in self.others.settled():
            if record is not None:
                self._found(self.steps[fingerprint], record)
            else:
                self.schedule.put_back(fingerprint)
                self._put_back("lost", fingerprint, "the other driver has given it up or is gone")

    def _start(self, step: Step, lane: Lane, group: Group) -> None:
        job = CARRIERS[step.kind].job(self.jobs, step)
        call = self.pools.by_name[lane.pool].call("run", job, step, self.workspace.store, group=group)
        self.running[call] = step
        self.deadlines.start(step)
        self._began[step.fingerprint] = time.time()
        self.counts.update((lane.name, lane.kind))
        self.progress.pace.at_once(step.kind for step in self.running.values())
        self.schedule.start(step.fingerprint)
        self.progress.started(step.fingerprint, step.label)

    def _complete(self, call: Call) -> None:
        step = self._off(call)
        try:
            record = call.result()
        except CorruptArtifact as error:
            self._put_back_lost(step, str(error))
        except Exception as error:
            self._retry_or_fail(step, error)
        else:
            self.workspace.keep(record)
            self._done(step, record, self.timeline.step(step, call.usages, call.group.name))

    def _off(self, call: Call) -> Step:
        """End the bookkeeping of a call that no longer runs. Returns its step."""
        step = self.running.pop(call)
        self.others.give_back(step)
        self.counts.subtract((self.lanes.of(step), step.kind))
        return step

    def _report(self) -> None:
        """Report finished steps to tracker and terminal, after their workers have got their next steps."""
        while self.untold:
            step, record, took = self.untold.pop(0)
            self.tracking.committed(step, record)
            self.progress.standings.finished(record)
            self.progress.finished(step.fingerprint, CARRIERS[step.kind].headline(record.result), took)
            for note in record.result.get("notes", ()):
                self.events.add("note", f"{step.label}: {note}", step=step.fingerprint)
            point("driver.after_commit")

    def _report_kept(self) -> None:
        """Report merges that stay as files against `storage.keep`; a line per reason."""
        for why, label in self.keeping.notes.items():
            self._note("note", f"{label} (and others like it) stays as a file: {why}", about=why)

    def _check_cluster(self) -> None:
        """Periodic work: nodes that come and go, groups that wait for one, overdue steps, the screen."""
        self.progress.tick()
        if time.monotonic() - self._checked < LOOK_SECONDS:
            return
        self._checked = time.monotonic()
        self._watch_tracker()
        if not self.head.check():
            return
        self._end_overdue()
        if self.capacity is None:
            self.pools.drop_idle(IDLE_SECONDS)
        else:
            self.capacity.update(nodes_now())
            self._check_places(self.capacity)
        self._note_waiting()

    def _note_waiting(self) -> None:
        """Report new groups that have not answered yet, with the reason if it is known, for as long as this lasts."""
        waiting = {
            group.name: why_waiting(group, self.capacity is None)
            for group in self.pools.not_up(WAITING_SECONDS)
        }
        for name in self._waiting.keys() - waiting.keys():
            self.progress.settled(name)
        for name, why in sorted(waiting.items() - self._waiting.items()):
            self._note("waiting", f"{name} {why}", about=name)
        self._waiting = waiting

    def _check_places(self, capacity: Capacity) -> None:
        """Raise ClusterError if the remaining steps have fitted on no node for GRACE_SECONDS."""
        try:
            if not self.running:
                self.lanes.check(capacity)
            self._unplaced_since = None
            self.progress.settled("nodes")
        except ClusterError as error:
            if self._unplaced_since is None:
                self._unplaced_since = time.monotonic()
                text = f"waiting {GRACE_SECONDS:g} s for nodes to come back: {error}"
                self._note("lost", text, about="nodes")
            if time.monotonic() - self._unplaced_since >= GRACE_SECONDS:
                raise

    def _end_overdue(self) -> None:
        """Give up steps without progress for too long."""
        for call, step in list(self.running.items()):
            if why := self.deadlines.why(step, call.group, elastic=self.capacity is None):
                call.abandon()
                self._retry_or_fail(self._off(call), StepTimeout(f"{why}; it was ended"))

    def _put_back_lost(self, step: Step, why: str) -> None:
        """Put back the inputs that were damaged and moved aside, then the step."""
        for need in self._gone(step.fingerprint):
            self.workspace.forget(need)
            self.schedule.put_back(need)
            self.progress.undone(need)
        self._retry_or_fail(step, CorruptArtifact(why))

    def _gone(self, fingerprint: str) -> list[str]:
        """Steps to repeat before this one: those whose artifacts are gone, and recipes with such an input."""
        found = []
        for need in self.schedule.needs(fingerprint):
            is_there = self.workspace.store.has(self.steps[need].kind, need)
            before = self._gone(need) if is_there and self.keeping.is_recipe(need) else []
            found += before + ([] if is_there and not before else [need])
        return found

    def _retry_or_fail(self, step: Step, error: Exception) -> None:
        if isinstance(error, WorkerLost):
            self._checked = 0.0  # its node may be lost: check before another step is placed there
        tries = self.tries.get(step.fingerprint, 0) + (not isinstance(error, PlaceLost))
        self.tries[step.fingerprint] = tries
        limit = self.study.resources.experts.max_retries
        if isinstance(error, OutOfMemory):
            limit = min(limit, MEMORY_RETRIES)
        if isinstance(error, FATAL) or tries > limit:
            self.tracking.failed(step, error)
            self.workspace.failure = {"step": step.label, "error": str(error)}
            if isinstance(error, FATAL):
                raise error
            failure = StepTimeout if isinstance(error, StepTimeout) else StepFailed
            raise failure(f"{step.label}: failed {tries} times, the last time with: {_first_line(error)}")
        self.schedule.put_back(step.fingerprint)
        kind = "lost" if isinstance(error, WorkerLost | CorruptArtifact) else "retry"
        self._put_back(kind, step.fingerprint, f"{_first_line(error)} (try {tries} of {limit})")
        time.sleep(0.1)

    def _note(self, kind: str, text: str, about: str = "") -> None:
        """Show a message for as long as it holds, and log it."""
        self.events.add(kind, text)
        self.progress.note(text, about)

    def _put_back(self, kind: str, fingerprint: str, why: str) -> None:
        """Log and show that a step did not complete and will run again."""
        self.events.add(kind, f"{self.steps[fingerprint].label}: {why}", step=fingerprint)
        self.progress.put_back(fingerprint, why, kind)

    def _watch_tracker(self) -> None:
        """Log when the tracker stops accepting rows, and when it accepts them again."""
        trouble = self.tracking.trouble
        if trouble != self._trouble:
            self.events.add("tracker", f"rows wait: {trouble}" if trouble else "rows are delivered again")
            self._trouble = trouble

    def _write_state(self) -> None:
        """Write the running steps and those waited for, for `status`, if they have changed."""
        running: list[Running] = [
            {"fingerprint": step.fingerprint, "kind": step.kind, "label": step.label, "began": self._began[step.fingerprint]}
            for step in self.running.values()
        ]  # fmt: skip
        waiting = self.others.waited_for()
        if (running, waiting) != self._written:
            write_driver(self.workspace.out, {"running": running, "waiting": waiting})
            self._written = running, waiting


def _name(workspace: Workspace) -> str:
    return f"study {workspace.study.name}"


def _ended(tracking: Tracking) -> str:
    rows = f"; {tracking.pending} rows wait for the tracker ({tracking.trouble})" if tracking.pending else ""
    return f"every step is done{rows}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
