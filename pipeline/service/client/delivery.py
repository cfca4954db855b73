"""The experts of a study on their way to a live service, while the study runs: `run STUDY --deliver URL`.

Experts go in time-step order, so a service that gets nothing else makes what the study makes, byte for byte. Where an expert starts from
what was merged before, the next one waits until the service has decided about the last.

Invariant: the store says which experts there are, the service says which it has. So the same study again sends what is missing, and the
study's own results depend on no service.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from merge_service.checkpoints import ADAPTER_FOLDER, WEIGHTS_FILE
from merge_service.errors import UserError
from pipeline.console import WARNING, complain
from pipeline.errors import ConfigError
from pipeline.kinds.specs import TrainSpec
from pipeline.plan.steps import Plan, Step
from pipeline.run.events import Events
from pipeline.service.client.calls import FINAL
from pipeline.service.client.connection import ServiceError
from pipeline.service.client.service import Service
from pipeline.store.artifact import Record
from pipeline.workspace.workspace import Workspace

LOOK_SECONDS = 1.0
LATER_SECONDS = 5.0
"""How long a service that does not answer is left alone, as long as the study runs."""
WAIT_SECONDS = 5
"""How long one request waits for a decision."""


@dataclass(frozen=True)
class Delivery:
    """Delivers to a service. `said` is said of every expert: owner, license."""

    service: Service
    said: dict[str, str]

    @contextlib.contextmanager
    def __call__(self, workspace: Workspace) -> Iterator[None]:
        """Deliver what the study makes meanwhile; at the end, what is left. Nothing is waited for after an error of the study.

        Raises ConfigError for a study that has two experts of a task, ServiceError for a service that does not let this token in, and
        UserError at the end if experts were not delivered.
        """
        experts = experts_of(workspace.plan)
        self.service.status()
        sending = _Sending(self, workspace, experts)
        thread = threading.Thread(target=sending.run, name="delivery", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            sending.given_up.set()
            raise
        finally:
            sending.study_ended.set()
            thread.join()
        if sending.done < len(experts):
            raise UserError(
                f"the study is done, but {len(experts) - sending.done} of its {len(experts)} experts were not delivered: {sending.trouble}; "
                "the same command again delivers what is missing"
            )
        print(f"the service has all {len(experts)} experts of the study", file=sys.stderr, flush=True)


def experts_of(plan: Plan) -> list[Step]:
    """The experts that a study trains, in time-step order. Raises ConfigError unless there is one for each task."""
    found = sorted((one for one in plan.steps.values() if one.kind == TrainSpec.kind), key=lambda one: one.t)
    by_task: dict[str, list[Step]] = {}
    for one in found:
        by_task.setdefault(one.task, []).append(one)
    twice = next((several for several in by_task.values() if len(several) > 1), None)
    if twice is not None:
        names = " and ".join(f"{one.label}, {one.fingerprint[:12]}" for one in twice[:2])
        raise ConfigError(
            f"--deliver: study {plan.study} trains {len(twice)} experts of the task {twice[0].task} ({names}), and a service gets one; "
            "choose one model, stream, recipe, seed and init, for instance by --set"
        )
    if not found:
        raise ConfigError(f"--deliver: study {plan.study} trains no expert")
    return found


class _Sending:
    """One delivery, in a thread of its own."""

    def __init__(self, delivery: Delivery, workspace: Workspace, experts: list[Step]) -> None:
        self.study_ended, self.given_up = threading.Event(), threading.Event()
        self.done, self.trouble = 0, ""
        self._delivery, self._workspace, self._experts = delivery, workspace, experts
        self._events = Events(workspace.out)
        self._last: str | None = None

    def run(self) -> None:
        """Send one expert after another; what cannot be sent is `trouble`."""
        try:
            for step in self._experts:
                record = self._finished(step)
                if record is None:
                    self.trouble = f"{step.label} is not in the store"
                if record is None or not self._sent(step, record):
                    return
                self.done += 1
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"
        if self.trouble and not self.given_up.is_set():
            self._events.add("warning", f"nothing more is delivered: {self.trouble}")
            complain("warning", f"nothing more is delivered: {self.trouble}", WARNING)

    def _finished(self, step: Step) -> Record | None:
        """The expert of a step, once it is in the store; None if the study ends without it."""
        while not self.given_up.is_set():
            ended = self.study_ended.is_set()
            record = self._workspace.store.record(step.kind, step.fingerprint)
            if record is not None:
                return record
            if ended:
                return None
            self.study_ended.wait(LOOK_SECONDS)
        return None

    def _sent(self, step: Step, record: Record) -> bool:
        """Send an expert, unless the service has it. A service that does not answer is tried again as long as the study runs."""
        while not self.given_up.is_set():
            ended = self.study_ended.is_set()
            try:
                self._send(step, record)
                return True
            except ServiceError as error:
                if error.code != "unreachable" and error.status < 500:
                    raise
                if ended:
                    self.trouble = str(error)
                    return False
                self._events.add("delivery", f"{step.label} waits: {error}")
            self.study_ended.wait(LATER_SECONDS)
        return False

    def _send(self, step: Step, record: Record) -> None:
        service, sha256 = self._delivery.service, record.sha256(WEIGHTS_FILE)
        known = next((one for one in service.arrivals(task=step.task) if one.sha256 == sha256), None)
        if known is not None:
            self._last = known.id
            return
        if step.inputs["init"] not in self._workspace.plan.bases:
            self._wait()
        started = self._workspace.known(step.inputs["init"])
        start = service.next(step.task)
        ticket = start.ticket if started and start.sha256 == started.sha256(WEIGHTS_FILE) else None
        said = {
            "note": f"{self._workspace.plan.study}, {step.label}, {step.fingerprint[:12]}",
            **self._delivery.said,
        }
        if ticket is None:  # its start is not one of the service's, which decides whether it takes such
            said["init"] = "foreign"
        path = self._workspace.store.open_verified(record)
        adapter = record.path / ADAPTER_FOLDER
        if ticket and adapter.is_dir():  # the service makes the same weights of it
            path = adapter
        came = service.arrive(path, step.task, ticket, lambda *_: None, **said)
        self._last = came.id
        other = "" if ticket else "; it started from other weights than those of the service"
        self._events.add("delivery", f"{step.label} is {came.id}{other}")

    def _wait(self) -> None:
        """Until the service has decided about the expert before."""
        while self._last is not None and not self.given_up.is_set():
            if self._delivery.service.show(self._last, WAIT_SECONDS).status in FINAL:
                return
