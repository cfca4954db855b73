"""The one loop that carries out a plan: what is ready goes to a free actor, what comes back is recorded.

Invariant: the driver holds no truth. Which steps are done is read from the store when it starts; an actor's answer only
means that the store has the artifact. So the same command, run again after any crash, goes on where things stood.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from pipeline.run.deadlines import Deadlines
from pipeline.run.events import Events
from pipeline.run.jobs import Jobs
from pipeline.run.lanes import Lanes
from pipeline.run.others import Others, other_versions
from pipeline.run.output import steady
from pipeline.run.progress import Progress, Standings, outlook
from pipeline.run.schedule import Schedule, ranks
from pipeline.run.trace import Timeline
from pipeline.store.lease import Holder
from pipeline.study.config import Study
from pipeline.tracking.session import Tracking
from pipeline.workspace.lock import driver_lock, write_driver, write_last
from pipeline.workspace.registrations import retire
from pipeline.workspace.workspace import Workspace

TICK_SECONDS = 0.5
LOOK_SECONDS = 5.0
WAITING_SECONDS = 15.0
"""How long a new group may be without an answer before that is said; importing torch takes a part of it."""
GRACE_SECONDS = 30.0
"""How long nodes that have gone may take to come back when nothing that is left to do has a place without them."""
IDLE_SECONDS = 60.0
"""How long an idle group is kept where nodes come and go by themselves."""
WAITED_SECONDS = 2.0
"""How long an idle group is kept while a step of another driver is waited for."""
FATAL = (UserError, NondeterminismError, StorageFull, CodeMismatch)
"""Errors that another try cannot mend."""
MEMORY_RETRIES = 2
"""Other work on the machine may have been what took the memory, but not thrice."""


@steady()
def carry_out(
    study: Study, out: Path | None, address: str, *, strict_versions: bool = False
) -> tuple[Path, dict[str, Any], Tracking]:
    """Run a study to its end, or from where it stopped: OUT, what results.json says, and the tracking.

    Not a word on stdout. With `strict_versions` no artifact is used that other library versions made.
    Raises UserError (exit 2), StorageFull or StepFailed.
    """
    check_address(address)
    workspace = Workspace.of(study, out)
    for warning in workspace.study.warnings:
        complain("warning", warning, WARNING)
    for name in {
        step.spec["technique"] for step in workspace.plan.steps.values() if "technique" in step.spec
    }:
        check_importable(technique_called(name))
    events = Events(workspace.out)
    with (
        driver_lock(workspace.out),
        _last_words(workspace, events),
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
        workspace.store.check_room(_name(workspace), summary["disk_bytes"])
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
            with tracking:
                if len(done) < len(workspace.plan.steps):
                    Timeline(workspace.out).event("start", address=address)
                    with connect(address, threads=workspace.study.resources.experts.threads) as session:
                        _Drive(workspace, session, tracking, done, strict_versions).run()
                results = workspace.write_results()
                tracking.finished(results)
        finally:
            workspace.tidy()
            retire(workspace.store, workspace.plan, workspace.out)
        events.add("end", _ended(tracking))
    return workspace.out, results, tracking


@contextlib.contextmanager
def _last_words(workspace: Workspace, events: Events) -> Iterator[None]:
    """Keep, for `status`, how a run ended."""
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
    """One run over one session."""

    def __init__(
        self,
        workspace: Workspace,
        session: Session,
        tracking: Tracking,
        done: set[str],
        strict_versions: bool = False,
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
        self.jobs, self.timeline = Jobs(workspace), Timeline(workspace.out)
        self.deadlines, self.head = Deadlines(self.study, workspace.scratch), Head()
        self.others = Others(workspace, strict_versions)
        self.running: dict[Call, Step] = {}
        self.counts: Counter[str] = Counter()
        self.tries: dict[str, int] = {}
        self.untold: list[tuple[Step, Any]] = []
        standings = Standings(workspace.plan)
        for record in filter(None, map(workspace.known, done)):
            standings.finished(record)
        self.progress = Progress(len(self.steps), len(self.schedule.done), workspace.scratch, standings)
        self._looked, self._waiting = 0.0, dict[str, str]()
        self._homeless: float | None = None
        self._began: dict[str, float] = {}
        self._said: tuple[list[dict[str, Any]], list[dict[str, str]]] = ([], [])
        self.timeline.event("ready", cores=session.cpus, gpus=session.gpus, nodes=len(session.nodes))

    def run(self) -> None:
        """Until every step is done. Raises what cannot be mended by trying again."""
        with self.others, self.progress, self.head, contextlib.ExitStack() as stack:
            stack.callback(self.pools.close)
            stack.callback(self._tell)
            while not self.schedule.finished:
                self._start_ready()
                self._say()
                self._tell()
                if self.schedule.finished:  # other drivers have done the rest
                    break
                for call in wait(list(self.running), TICK_SECONDS):
                    self._take(call)
                self._ask_others()
                self._look_after()

    def _start_ready(self) -> None:
        """Start what is most important and has a place, until nothing is both.

        Nodes on which something more important will have its place are kept clear for it.
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
            if self._is_mine(self.steps[fingerprint]):
                self._start(self.steps[fingerprint], lane, group)

    def _best(self, barred: set[str]) -> tuple[str, Lane] | None:
        """The most important step of the lanes that are neither barred nor at their cap."""
        most = self.study.schedule.max_running
        found = []
        for name in self.schedule.lanes - barred:
            lane = self.lanes.by_name[name]
            of_kind = getattr(most, lane.kind)
            if (lane.cap is None or self.counts[name] < lane.cap) and (
                of_kind is None or self.counts[lane.kind] < of_kind
            ):
                first = self.schedule.first(name)
                found += [] if first is None else [(*first, lane)]
        if not found:
            return None
        _, fingerprint, lane = min(found, key=lambda entry: entry[:2])
        return fingerprint, lane

    def _is_mine(self, step: Step) -> bool:
        """Whether to carry out a step here: not if another driver does it now, or has done it meanwhile."""
        found = self.others.take(step)
        if isinstance(found, Holder):
            text = f"{step.label}: waiting for {found}, which carries it out"
            self._note("waiting", text, about=step.fingerprint)
            self.schedule.start(step.fingerprint)
            self.progress.started(step.fingerprint, f"{step.label} (waiting for {found})")
        elif found is not None:
            self._found(step, found)
        return found is None

    def _found(self, step: Step, record: Any) -> None:
        """Another driver has carried out a step."""
        text = self.others.other_versions(record)
        if text:
            self._note("versions", text)
        self.progress.started(step.fingerprint, f"{step.label} (by another driver)")
        self.schedule.finish(step.fingerprint)
        self.untold.append((step, record))

    def _ask_others(self) -> None:
        """What has become of the steps that other drivers carry out: done, or free to be done here.

        Idle workers are let go meanwhile: on a cluster that both share they may hold the very place that the other waits for.
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
        self.schedule.start(step.fingerprint)
        self.progress.started(step.fingerprint, step.label)

    def _take(self, call: Call) -> None:
        step = self._off(call)
        try:
            record = call.result()
        except CorruptArtifact as error:
            self._put_back_lost(step, str(error))
        except Exception as error:
            self._retry_or_fail(step, error)
        else:
            self.schedule.finish(step.fingerprint)
            self.workspace.keep(record)
            self.timeline.step(step, call.usages, call.group.name)
            self.untold.append((step, record))

    def _off(self, call: Call) -> Step:
        """A call runs no longer: the step it was for."""
        step = self.running.pop(call)
        self.others.give_back(step)
        self.counts.subtract((self.lanes.of(step), step.kind))
        return step

    def _tell(self) -> None:
        """Tell tracker and terminal what has been finished: after its workers have got their next steps."""
        while self.untold:
            step, record = self.untold.pop(0)
            self.tracking.committed(step, record)
            self.progress.standings.finished(record)
            self.progress.finished(step.fingerprint, CARRIERS[step.kind].headline(record.result))
            for note in record.result.get("notes", ()):
                self.events.add("note", f"{step.label}: {note}", step=step.fingerprint)
            point("driver.after_commit")

    def _look_after(self) -> None:
        """What has to be seen to now and then: nodes that come and go, groups that wait for one, the screen."""
        self.progress.tick()
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
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
        """Say which new groups have not answered yet, and why as far as that is known, for as long as it is true."""
        waiting = {group.name: self._why_waiting(group) for group in self.pools.not_up(WAITING_SECONDS)}
        for name in self._waiting.keys() - waiting.keys():
            self.progress.settled(name)
        for name, why in sorted(waiting.items() - self._waiting.items()):
            self._note("waiting", f"{name} {why}", about=name)
        self._waiting = waiting

    def _why_waiting(self, group: Group) -> str:
        if group.placed:
            return "is still starting: importing its libraries takes long on its node"
        if self.capacity is not None:
            return "has no process yet: its node is slow to start one, or another job of the cluster has the place"
        return "waits for a place: it is taken, or a node has yet to come (or is slow to start a process)"

    def _check_places(self, capacity: Capacity) -> None:
        """Raise ClusterError if what is left has had no place on any node for GRACE_SECONDS."""
        try:
            if not self.running:
                self.lanes.check(capacity)
            self._homeless = None
            self.progress.settled("nodes")
        except ClusterError as error:
            if self._homeless is None:
                self._homeless = time.monotonic()
                text = f"waiting {GRACE_SECONDS:g} s for nodes to come back: {error}"
                self._note("lost", text, about="nodes")
            if time.monotonic() - self._homeless >= GRACE_SECONDS:
                raise

    def _end_overdue(self) -> None:
        """Give up what has been silent for too long: a step from when its workers were up, and before that their start-up.

        Waiting for nodes that have yet to join has no limit.
        """
        for call, step in list(self.running.items()):
            up = call.group.up
            if not up:
                self.deadlines.start(step)
            if why := self._overdue(step) if up else self._stillborn(call.group):
                call.abandon()
                self._retry_or_fail(self._off(call), StepTimeout(f"{why}; it was ended"))

    def _overdue(self, step: Step) -> str:
        if not self.deadlines.overdue(step):
            return ""
        return (
            f"its worker showed no sign of progress for {self.deadlines.limit(step):g} s (resources: timeout)"
        )

    def _stillborn(self, group: Group) -> str:
        limit, placed = self.study.resources.start_timeout, group.placed
        if time.monotonic() - group.since <= limit or (self.capacity is None and not placed):
            return ""
        return f"its worker had not started after {limit:g} s (resources: start_timeout)"

    def _put_back_lost(self, step: Step, why: str) -> None:
        """An input was damaged and has been moved aside: make it again, then this step."""
        for need in self.schedule.needs(step.fingerprint):
            if not self.workspace.store.has(self.steps[need].kind, need):
                self.workspace.forget(need)
                self.schedule.put_back(need)
        self._retry_or_fail(step, CorruptArtifact(why))

    def _retry_or_fail(self, step: Step, error: Exception) -> None:
        if isinstance(error, WorkerLost):
            self._looked = 0.0  # its node may have gone: look before anything else is placed there
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
        """Something a person should know now, for as long as it is true, and may look up later."""
        self.events.add(kind, text)
        self.progress.note(text, about)

    def _put_back(self, kind: str, fingerprint: str, why: str) -> None:
        """A step did not end and will run again."""
        self.events.add(kind, f"{self.steps[fingerprint].label}: {why}", step=fingerprint)
        self.progress.put_back(fingerprint, why)

    def _watch_tracker(self) -> None:
        """Log when the tracker stops taking rows, and when it takes them again."""
        trouble = self.tracking.trouble
        if trouble != self._trouble:
            self.events.add("tracker", f"rows wait: {trouble}" if trouble else "rows are delivered again")
            self._trouble = trouble

    def _say(self) -> None:
        """What is running and what is waited for, for `status`; written when it has changed."""
        running = [
            {
                "fingerprint": step.fingerprint,
                "kind": step.kind,
                "label": step.label,
                "began": self._began[step.fingerprint],
            }
            for step in self.running.values()
        ]
        waiting = self.others.waited_for()
        if (running, waiting) != self._said:
            write_driver(self.workspace.out, {"running": running, "waiting": waiting})
            self._said = running, waiting


def _name(workspace: Workspace) -> str:
    return f"study {workspace.study.name}"


def _ended(tracking: Tracking) -> str:
    if not tracking.pending:
        return "every step is done"
    return f"every step is done; {tracking.pending} rows wait for the tracker ({tracking.trouble})"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
