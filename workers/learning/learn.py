"""Learns the coefficients of a merge on images of the tasks: fill the model, take gradients, project them, step.

Invariant: a pure function of base, experts, arrays and parameters, on one kind of device with one number of threads; an interruption
changes no bit.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from merge_service.anatomy import modality
from merge_service.checkpoints import overwrites, sha256_of
from merge_service.errors import UserError
from merge_service.faults import point
from merge_service.statistics import COEFFICIENTS, About, Numbers, Statistics, write
from workers.evidence.asked import Asked, Inputs
from workers.evidence.network import Opened, open_model, temperature_of
from workers.learning.adam import Adam, Tensors
from workers.learning.blends import Blend, blend_of, put
from workers.learning.members import Members, opened
from workers.learning.objectives import Objective, needs_experts, objective_of
from workers.learning.progress import Progress
from workers.learning.tasks import Task, tasks_of
from workers.learning.trimmed import trimmed
from workers.learning.wanted import Wanted

EVERY = 50
"""Steps between two checkpoints."""


@dataclass(frozen=True)
class Where:
    """Files: the experts in their order, the base, the result; `config` names the architecture of a base without a configuration.

    `warm_start` are coefficients that were learned before, from which known experts begin. A checkpoint is written `every` so many
    steps, to `kept`, by default beside the result. `tell` is called after every step with its number and the loss before it.
    """

    experts: Sequence[Path]
    base: Path
    out: Path | None = None
    config: str | None = None
    warm_start: Path | None = None
    every: int = EVERY
    kept: Path | None = None
    tell: Callable[[int, float], None] | None = None

    @property
    def progress(self) -> Path | None:
        """The checkpoint, None to keep none."""
        if self.kept is not None or self.out is None:
            return self.kept
        return self.out.with_name(f"{self.out.stem}.learning.safetensors")


class Learned(Numbers):
    """Coefficients by parameter name."""

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss before every step."""
        return self.about.losses


@dataclass
class Run:
    """One learning: how values make a model, what is minimised, and the optimizer."""

    members: Members
    names: Sequence[str]
    blend: Blend
    objective: Objective
    adam: Adam

    @property
    def values(self) -> Tensors:
        """All that moves by the optimizer."""
        return {**self.blend.values, **self.objective.values}

    def gradients(self, step: int, turn: Sequence[int]) -> tuple[float, Tensors]:
        """The loss of a part of a step, and its gradients; no gradients where no image counted."""
        parameters = [self.members.parameter(name) for name in self.names]
        total, sums = 0.0, dict[str, torch.Tensor]()
        for number in turn:
            loss = self.objective.loss(self.objective.tasks[number], step)
            if loss is None:
                continue
            total += float(loss.detach())
            own = {
                name: one
                for name, one in self.objective.values.items()
                if one.requires_grad and name.endswith(f":{number}")
            }
            found = torch.autograd.grad(loss, [*parameters, *own.values()])
            for name, one in zip([*self.names, *own], found):
                sums[name] = sums[name].add_(one) if name in sums else one
        if not sums:
            return total, {}
        pulled = self.blend.pull(sums)
        added, more = self.objective.extra(self.blend.values)
        for name, one in more.items():
            pulled[name] += one
        heads = {name: sums[name] for name in self.objective.values if name in sums}
        return total + added, {**pulled, **heads}

    def step(self, step: int) -> float:
        """Fill, take gradients and move; returns the loss before."""
        total = 0.0
        for turn in self.objective.turns(step):
            self.blend.fill(step)
            self.objective.prepare(step)
            loss, gradients = self.gradients(step, turn)
            total += loss
            self.adam.step({name: one.detach() for name, one in self.values.items()}, gradients)
            self.blend.settle()
        return total

    def groups(self) -> dict[str, Tensors]:
        """All that the next step depends on."""
        found = {"values": self.values, "first": self.adam.first, "second": self.adam.second}
        aside = self.objective.adam
        if aside is not None:
            found |= {"aside": self.objective.aside, "aside_first": aside.first, "aside_second": aside.second}
        return found


def learn(wanted: Wanted, where: Where, inputs: Sequence[Inputs]) -> Learned:
    """Learn, and write the file if one is named; continues an interrupted learning of the same.

    Raises UserError for parameters, inputs or weights that do not fit, and `NonFiniteCheckpoint` where the model gives NaN or infinity.
    """
    check_counts(wanted, where, inputs)
    wanted = settled(wanted, len(inputs))
    with trimmed(wanted, where.base, where.experts) as experts:
        model = open_model(where.base, Asked("gram", device=wanted.device), where.config)
        with opened(where.base, experts, model) as members:
            tasks = start(wanted, members, inputs, temperature_of(where.base))
            digests = [sha256_of(path) for path in where.experts]
            about = about_of(wanted, where, tasks, digests)
            run = run_of(wanted, where, members, tasks)
            if where.warm_start is not None:
                warm(run.blend, where.warm_start, digests)
            losses = carry_out(run, wanted, where, identity_of(about))
    tensors = {name: one.detach().double().cpu().numpy() for name, one in run.values.items()}
    about = dataclasses.replace(about, losses=tuple(losses))
    if where.out is not None:
        write(where.out, tensors, about)
        Progress(where.progress, "").remove()
    return Learned(tensors, about, where.out)


def check_counts(wanted: Wanted, where: Where, inputs: Sequence[Inputs]) -> None:
    """Raise UserError for a number of experts or tasks that the method cannot use."""
    if not where.experts:
        raise UserError(f"{wanted.method} needs at least one expert")
    if not isinstance(where.every, int) or where.every < 1:
        raise UserError(f"every = {where.every!r} is no number of steps between checkpoints: 1 or more")
    if wanted.row.each and len(inputs) != len(where.experts):
        raise UserError(
            f"{wanted.method} compares every expert on its own task: {len(inputs)} tasks for {len(where.experts)} experts; give one each"
        )
    if wanted.fold and len(where.experts) != 2:
        raise UserError(
            f"a fold has two models, the running one and the new expert, not {len(where.experts)}"
        )
    if wanted.frozen >= len(where.experts) and wanted.frozen:
        raise UserError(f"frozen = {wanted.frozen} leaves nothing to learn of {len(where.experts)} experts")
    if where.out and any(overwrites(where.out, path) for path in (*where.experts, where.base)):
        raise UserError(f"--out {where.out} is one of the inputs and would be lost; give another --out")


def settled(wanted: Wanted, tasks: int) -> Wanted:
    """A fold starts from the running model; with images of the new task alone, that one's coefficients do not move."""
    if not wanted.fold:
        return wanted
    assert isinstance(wanted.start, float | int)
    return dataclasses.replace(
        wanted, start=(1.0, float(wanted.start)), frozen=1 if tasks == 1 else wanted.frozen
    )


def names_of(wanted: Wanted, model: Opened) -> list[str]:
    """The parameters that have coefficients: of the image tower or of both, and never the temperature."""
    named = [name for name, _ in model.model.named_parameters()]
    kept = [name for name in named if name.rpartition(".")[2] not in ("logit_scale", "logit_bias")]
    return [name for name in kept if wanted.towers == "both" or modality(name) == "image"]


def start(wanted: Wanted, members: Members, inputs: Sequence[Inputs], scale: float) -> list[Task]:
    """The model with towers that are not learned as they will be merged, and the tasks."""
    model, learned = members.model, set(names_of(wanted, members.model))
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(name in learned)
        if name not in learned and modality(name) == "text" and name.rpartition(".")[2] != "logit_scale":
            put(members, name, wanted.unlearned(len(members.experts)))
    return tasks_of(wanted, model, inputs, scale)


def run_of(wanted: Wanted, where: Where, members: Members, tasks: Sequence[Task]) -> Run:
    """A learning at its beginning."""
    names = names_of(wanted, members.model)
    predicted = []
    if needs_experts(wanted):
        for path, task in zip(where.experts, tasks):
            expert = open_model(path, Asked("gram", device=wanted.device), _config(where, path))
            predicted.append(task.all_log_p(expert))
    blend = blend_of(wanted, members, names)
    objective = objective_of(wanted, tasks, members.model, predicted)
    return Run(
        members, names, blend, objective, Adam({**blend.values, **objective.values}, wanted.learning_rate)
    )


def _config(where: Where, expert: Path) -> str | None:
    """The architecture of an expert: that of the base."""
    if where.config is not None:
        return where.config
    return str(where.base if where.base.is_dir() else where.base.parent)


def carry_out(run: Run, wanted: Wanted, where: Where, identity: str) -> list[float]:
    """All steps, from the checkpoint if there is one; returns the loss before every step."""
    progress, aside = Progress(where.progress, identity), run.objective.adam
    counts = {**run.adam.counts, **(aside.counts if aside else {})}
    losses = progress.restore(run.groups(), counts)
    run.adam.counts = {name: counts[name] for name in run.adam.counts}
    if aside is not None:
        aside.counts = {name: counts[name] for name in aside.counts}
    for step in range(len(losses), wanted.steps):
        losses.append(run.step(step))
        if where.tell is not None:
            where.tell(step + 1, losses[-1])
        point("learn.after_step")
        if (step + 1) % where.every == 0 and step + 1 < wanted.steps:
            progress.save(run.groups(), {**run.adam.counts, **(aside.counts if aside else {})}, losses)
            point("learn.after_ckpt")
    return losses


def warm(blend: Blend, file: Path, experts: Sequence[str]) -> None:
    """Let experts that the file knows (by sha256) begin with their coefficients there. Raises UserError where it knows none."""
    with Statistics(file) as held:
        known = {sha256: number for number, sha256 in enumerate(held.about.experts)}
        pairs = [(at, known[one]) for at, one in enumerate(experts) if one in known]
        if held.kind != COEFFICIENTS or not pairs:
            raise UserError(
                f"{file} holds learned coefficients of none of these experts; leave --warm-start out"
            )
        for name, value in blend.values.items():
            found = held.factors(name)
            if found is None:
                continue
            wide = torch.from_numpy(found)
            if wide.shape[blend.each :] != value.shape[blend.each :]:
                raise UserError(
                    f"{file}: {name} has shape {list(wide.shape)}, and {list(value.shape)} is learned; leave --warm-start out"
                )
            if not blend.each:
                value.copy_(wide)
            for at, number in pairs if blend.each else ():
                value[at] = wide[number]


def about_of(wanted: Wanted, where: Where, tasks: Sequence[Task], digests: Sequence[str]) -> About:
    """What the coefficients are of."""
    learning = {
        **wanted.said(),
        "device": torch.device(wanted.device).type,
        "threads": torch.get_num_threads(),
        "data": [task.digest() for task in tasks],
    }
    if where.warm_start is not None:
        learning["warm_start"] = sha256_of(where.warm_start)
    parameters = {**wanted.of_merge(), "method": wanted.method, "learning": learning}
    return About(
        COEFFICIENTS, {}, sum(task.size for task in tasks), parameters=parameters, technique=wanted.row.technique,
        experts=tuple(digests), base_sha256=sha256_of(where.base),
    )  # fmt: skip


def identity_of(about: About) -> str:
    """A digest of all that bears on the result, except the number of steps."""
    learning = {key: value for key, value in about.parameters["learning"].items() if key != "steps"}
    said = [about.experts, about.base_sha256, about.parameters["method"], learning]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
