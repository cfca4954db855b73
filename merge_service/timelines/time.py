"""TIME's timeline as data: which weights a task starts from, and which are served after it.

Everything here is pure and determines *what* is needed, never how or where it is made. A strategy has three axes
(initialization, deployment, technique). The first two have the same values:

    base    the base model
    latest  the expert of the newest finished task
    all     one merge of all finished experts, in time-step order, anchored at the base
    ema     a fold: M_k = technique(M_{k-1}, expert_k), anchored at the base

The stored expert is always the trained one, never the merged model, so the inputs of a merge are experts, the base and
(for a fold) the fold before it. Before the first finished task every rule gives the base.
Source: "How to Merge Your Multimodal Models Over Time?" (TIME, arXiv 2412.06712), section on the framework, and the
authors' FoMo-in-Flux protocols (`ema_paint`: the fold starts at the base; `double_merge_*`: at the first expert).

Invariant: every weights value returned here is Base, an expert with 1 <= t, or a merge whose `parents` are such values
of an earlier or equal time step, so merges made in the order of `derivations` never wait for a later one.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from merge_service.errors import TechniqueError
from merge_service.techniques.definition import Evidence, Technique
from merge_service.techniques.registry import get

INITIALIZATIONS = ("base", "latest", "all", "ema")
DEPLOYMENTS = ("latest", "all", "ema", "base")
EMA_SEEDS = ("base", "first_expert")
MERGING = ("all", "ema")

Policy = Literal["all", "ema"]


@dataclass(frozen=True)
class Base:
    """The base model."""


@dataclass(frozen=True)
class Expert:
    """The weights after training on task `t` (1-based)."""

    t: int


@dataclass(frozen=True)
class Merged:
    """The merge of the experts of tasks 1..t: all at once, or folded one by one."""

    policy: Policy
    t: int

    @property
    def form(self) -> Literal["merge", "fold"]:
        """The form of the technique that makes these weights."""
        return "merge" if self.policy == "all" else "fold"


Weights = Base | Expert | Merged


@dataclass(frozen=True)
class Merge:
    """How one merge is made: a technique with its effective parameters over members, anchored at the base.

    `members` are in the order the technique takes them: oldest first; in a fold the running model, then the new expert. A fold that
    `resumes` a state, which the experts so far give again, names all of these instead.
    """

    result: Merged
    technique: str
    params: Mapping[str, Any] = field(hash=False)
    members: tuple[Weights, ...]
    resumes: bool = False

    def ids(self, names: Mapping[int, str] | None = None) -> tuple[str, ...]:
        """The ids of the members, which also seed random masks: t3 for the expert of task 3 unless `names` has another id, and
        running-2 for the result of a fold after task 2, whatever that is.
        """
        named = names or {}
        experts = [named.get(one.t, expert_id(one.t)) for one in self.members if isinstance(one, Expert)]
        if self.result.form == "merge" or self.resumes:
            return tuple(experts)
        return f"running-{self.result.t - 1}", experts[-1]


@dataclass(frozen=True)
class Strategy:
    """One point of the grid.

    `params` are the technique's, for both of its forms at once (`weight` applies to the fold, `schedule` to the merge). `mixture`
    is (pretraining, update, buffer) data weights, None for the study's own. `joint` means one single task that holds the data of
    all tasks (the multitask upper reference). `alone` is the result of `all` while there is one expert: the technique's merge of
    one, or the expert as it is. `parity` names the definitions that the other fields are written in, until `parity.translate` has
    translated them into ours.
    """

    init: str = "base"
    deploy: str = "all"
    technique: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ema_seed: str = "base"
    mixture: tuple[float, float, float] | None = None
    joint: bool = False
    alone: Literal["merge", "expert"] = "merge"
    parity: str | None = None


NO_REPLAY = (0.0, 1.0, 0.0)
REPLAY = (0.33, 0.34, 0.33)

PRESETS: dict[str, Strategy] = {
    "zero_shot": Strategy("base", "base"),
    "offline_merging": Strategy("base", "all", "average", mixture=NO_REPLAY),
    "offline_merging_replay": Strategy("base", "all", "average", mixture=REPLAY),
    "offline_merging_weighted": Strategy("base", "all", "average", {"schedule": "linear"}, mixture=NO_REPLAY),
    "continual_finetuning": Strategy("latest", "latest", mixture=NO_REPLAY),
    "continual_finetuning_replay": Strategy("latest", "latest", mixture=REPLAY),
    "multitask": Strategy("base", "latest", mixture=(0.33, 0.67, 0.0), joint=True),
    "best_in_time": Strategy("ema", "ema", "average", {"weight": 0.5}),
}


def initial(strategy: Strategy, t: int) -> Weights:
    """The weights that training on task `t` (1-based) starts from."""
    if t < 1:
        raise ValueError(f"tasks are numbered from 1, not {t}")
    return _after(strategy, strategy.init, t - 1)


def deployed(strategy: Strategy, t: int) -> Weights:
    """The weights served after task `t`; t = 0 is before any task, so the base."""
    if t < 0:
        raise ValueError(f"time steps start at 0, not {t}")
    return _after(strategy, strategy.deploy, t)


def parents(strategy: Strategy, merged: Merged) -> tuple[Weights, ...]:
    """The members of `merged`, in the order the technique takes them (a fold: the running model, then the new expert).

    The base as the anchor of task vectors is not among them unless the fold itself starts there. A fold of sums that the weights of a
    running model do not hold takes all experts so far; a kept state makes it as cheap as any other.
    """
    if merged.policy == "all" or _resumes(strategy, merged):
        return tuple(Expert(i) for i in range(1, merged.t + 1))
    return _after(strategy, "ema", merged.t - 1), Expert(merged.t)


def derivations(strategy: Strategy, t: int, *, last: bool = False) -> tuple["Merge", ...]:
    """The merges that the arrival of expert `t` (1-based) makes possible and that are used, in the order to make them.

    Studies and the service both call this, so equal arrivals give equal merges. `last`: no task follows, so nothing is merged to
    start one from.
    """
    return tuple(derivation(strategy, one) for one in results(strategy, t, last=last))


def results(strategy: Strategy, t: int, *, last: bool = False) -> tuple[Merged, ...]:
    """What `derivations` makes, without the members, which are as many as t."""
    if not needs_experts(strategy):
        return ()
    used = [deployed(strategy, t), *([] if last else [initial(strategy, t + 1)])]
    merged = {weights for weights in used if isinstance(weights, Merged)}
    return tuple(sorted(merged, key=lambda one: one.policy))


def derivation(strategy: Strategy, merged: Merged) -> Merge:
    """How one of the results of a time step is made."""
    params = params_for(strategy, merged)
    members, resumes = parents(strategy, merged), _resumes(strategy, merged)
    return Merge(merged, str(strategy.technique), params, members, resumes)


def _resumes(strategy: Strategy, merged: Merged) -> bool:
    """Whether a merge is a fold that continues a state."""
    return merged.form == "fold" and strategy.technique is not None and _technique(strategy).resumes


def expert_id(t: int) -> str:
    """The id of the expert of task `t` in merges, where it has no other."""
    return f"t{t}"


def params_for(strategy: Strategy, merged: Merged) -> dict[str, Any]:
    """The full effective parameters of one merge; equal merges of different strategies have equal ones.

    Per-expert `weights` are cut to the number of experts at that time step.
    """
    params = dict(strategy.params)
    if params.get("weights") is not None and merged.policy == "all":
        params["weights"] = list(params["weights"])[: merged.t]
    return _technique(strategy).resolve(params, merged.form)


def policies(strategy: Strategy) -> tuple[Policy, ...]:
    """The merging policies that the strategy uses, for initialization or deployment."""
    used: tuple[Policy, ...] = MERGING  # type: ignore[assignment]
    return tuple(p for p in used if p in (strategy.init, strategy.deploy))


def needs_experts(strategy: Strategy) -> bool:
    """Whether anything has to be trained."""
    return strategy.deploy != "base"


def check(strategy: Strategy, tasks: int | None = None) -> None:
    """Raise `TechniqueError` for a strategy that cannot run; with `tasks`, also for one that does not fit their number."""
    _one_of("init", strategy.init, INITIALIZATIONS)
    _one_of("deploy", strategy.deploy, DEPLOYMENTS)
    _one_of("ema_seed", strategy.ema_seed, EMA_SEEDS)
    if strategy.deploy == "base" and strategy.init != "base":
        raise TechniqueError(
            f"init: {strategy.init} with deploy: base would train experts that are never served; "
            "use deploy: latest, all or ema, or init: base for the zero-shot reference"
        )
    if strategy.mixture is not None:
        _check_mixture(strategy.mixture)
    if strategy.technique is None:
        _check_without_technique(strategy)
    else:
        _check_technique(strategy, tasks)


def warnings(strategy: Strategy) -> list[str]:
    """Warnings about strategies that run but are known to end badly, such as a fold that doubles its past at every task."""
    if strategy.technique is None:
        return []
    return _technique(strategy).warnings(strategy.params, strategy.init, strategy.deploy)


def _after(strategy: Strategy, rule: str, finished: int) -> Weights:
    if finished == 0 or rule == "base":
        return Base()
    if rule == "latest":
        return Expert(finished)
    if rule == "all":
        return Expert(1) if finished == 1 and strategy.alone == "expert" else Merged("all", finished)
    if finished == 1 and strategy.ema_seed == "first_expert":
        return Expert(1)
    return Merged("ema", finished)


def _technique(strategy: Strategy) -> Technique:
    if strategy.technique is None:
        raise TechniqueError(
            f"init: {strategy.init}, deploy: {strategy.deploy} has no technique to merge with"
        )
    return get(strategy.technique)


def _check_without_technique(strategy: Strategy) -> None:
    if policies(strategy):
        raise TechniqueError(
            f"init: {strategy.init}, deploy: {strategy.deploy} merges, so it needs a technique (for instance average)"
        )
    if strategy.params:
        raise TechniqueError(
            f"params {sorted(strategy.params)} are given but there is no technique to take them"
        )


def _check_technique(strategy: Strategy, tasks: int | None) -> None:
    technique = _technique(strategy)
    used = policies(strategy)
    for policy in used:
        technique.require(Merged(policy, 1).form)
    if "all" in used and technique.arity is not None:
        raise TechniqueError(
            f"{technique.name} merges exactly {technique.arity} checkpoints, so it cannot merge all experts of a stream; "
            "use init/deploy: ema, which folds them one by one"
        )
    _check_carried(technique, strategy, used)
    forms = {Merged(policy, 1).form for policy in used}
    for form in forms or {"merge"}:
        technique.resolve(strategy.params, form)
    idle = sorted(name for name in strategy.params if forms and not forms & technique.param(name).forms)
    if idle:
        raise TechniqueError(
            f"{technique.name}: {', '.join(idle)} has no effect with init: {strategy.init}, deploy: {strategy.deploy} "
            f"(it belongs to the {'/'.join(sorted(technique.param(idle[0]).forms))} form); remove it"
        )
    weights = strategy.params.get("weights")
    if weights is not None and tasks is not None and "all" in used and len(weights) != tasks:
        raise TechniqueError(
            f"{technique.name}: weights has {len(weights)} entries but the stream has {tasks} tasks"
        )
    if "all" in used:
        params_for(strategy, Merged("all", 1))


def _check_carried(technique: Technique, strategy: Strategy, used: tuple[Policy, ...]) -> None:
    """Raise `TechniqueError` for what a study does not carry from step to step, and a fold that begins where it cannot."""
    if isinstance(strategy.params.get("density"), list | tuple):
        raise TechniqueError(
            f"{technique.name}: density is one number in a study; a list with one per expert is for a merge of files"
        )
    if technique.learned and strategy.params.get("adapted_on") == "test":
        raise TechniqueError(
            f"{technique.name}: adapted_on: test marks a merge of files; a study learns on training splits, so leave adapted_on out"
        )
    if strategy.params.get("coefficients") is not None:
        raise TechniqueError(
            f"{technique.name}: coefficients belong to one list of experts, and a study merges a list at every t; use weights"
        )
    if "ema" in used and technique.resumes and strategy.ema_seed != "first_expert":
        raise TechniqueError(
            f"{technique.name} folds sums over experts, of which the base has none, so the fold cannot begin at the base; "
            "set ema_seed: first_expert"
        )


def measured(strategy: Strategy) -> tuple[Evidence, ...]:
    """What must be measured on data for the merges of a strategy; nothing if its weights are enough."""
    if strategy.technique is None:
        return ()
    asked = (
        _technique(strategy).asked(params_for(strategy, Merged(policy, 1))) for policy in policies(strategy)
    )
    return tuple(dict.fromkeys(one for one in asked if one is not None and one.of != "learned"))


def learns(strategy: Strategy) -> bool:
    """Whether the merges of a strategy have coefficients that must be learned first, for their experts."""
    return bool(policies(strategy)) and strategy.technique is not None and _technique(strategy).learned


def check_served(strategy: Strategy) -> None:
    """Raise `TechniqueError` for a strategy of which a service, which has no data and no states of folds, cannot make the merges."""
    if learns(strategy):
        raise TechniqueError(
            f"{strategy.technique} merges with coefficients that must be learned for the experts of every t, which a service does not do; "
            "merge files (`temporal-merge learn`, then `temporal-merge merge --coefficients FILE`), or choose another technique"
        )
    if asked := measured(strategy):
        raise TechniqueError(
            f"{strategy.technique} needs measurements ({asked[0].kind}) of every expert, which a service does not make; merge files "
            "(`temporal-merge measure`, then `temporal-merge merge --statistics FILE`), or choose another technique"
        )
    if "ema" in policies(strategy) and _technique(strategy).resumes:
        raise TechniqueError(
            f"{strategy.technique} folds from a state of its own, which a service does not keep; deploy all, or choose another technique"
        )


def _check_mixture(mixture: tuple[float, float, float]) -> None:
    if len(mixture) != 3 or any(not 0 <= part <= 1 for part in mixture) or abs(sum(mixture) - 1) > 1e-6:
        raise TechniqueError(
            f"mixture {mixture} must be three fractions (pretraining, update, buffer) that sum to 1"
        )


def _one_of(axis: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TechniqueError(f"{axis}: {value!r} is not one of {', '.join(allowed)}{hint}")
