"""Gathers the inputs of a plan: the bases, the data, and the cost of a training sample.

Invariant: facts describe content, never paths: the same base and shards give the same facts on any machine. Gathering
them trains nothing and needs no cluster. torch is loaded only if a budget in GFLOPs requires a measurement.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from merge_service.checkpoints import CONFIG_FILE, Checkpoint
from merge_service.errors import CheckpointError, IncompatibleCheckpoint, UserError
from merge_service.timelines import needs_experts
from pipeline.errors import PlanError
from pipeline.identity import canonical, fingerprint
from pipeline.plan.steps import TRAIN, DatasetFacts, Described, Facts, ModelFacts
from pipeline.store.artifact import hash_file
from pipeline.study.config import Study
from pipeline.study.sections import ModelSection, key_of
from pipeline.study.sections_stream import StreamSection
from pipeline.study.streams import Element, Stream, datasets_of, make_stream
from workers.data.cache import Access, cache_root, is_writable, recall, remember
from workers.data.contents import Survey
from workers.data.encoded.addresses import check_allowed
from workers.data.manifest import SUITE_FILE, DatasetInfo, describe, folder, read_suite, unread_bytes, verify
from workers.data.seen import content_digest, encoded_digest, notes, reads_encoded
from workers.models.base import STATED, Base, check_temperature, configuration_of, find, is_path, temperature
from workers.models.configuration import HUB, LOCAL, ModelError, own_configuration, read_configuration
from workers.training.recipe import Recipe

LARGE_BYTES = 10**9
"""Reading this much data takes so long that it is announced."""


def ensure_data(study: Study) -> None:
    """Write the mini suite on first use; all other data must exist.

    Raises UserError if another edition of the suite exists than the one that the bases of this version were made for.
    """
    if study.data.suite != "mini":
        return
    from workers.data.mini import EDITION, build

    if not (Path(study.data_root) / SUITE_FILE).is_file():

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        say(f"{study.data_root} is not there yet: writing the mini suite out of installed packages")
        build(Path(study.data_root), say, min(4, os.cpu_count() or 1))
    elif (found := read_suite(study.data_root).get("edition", EDITION)) != EDITION:
        raise UserError(
            f"data: {study.data_root} holds edition {found} of the mini suite, this version works with edition {EDITION}; "
            f"write it again with `python -m workers.data.mini --root {study.data_root}`, or give data.root another folder"
        )


def cache_of(study: Study) -> Path:
    """Directory for decoded splits, indices of foreign roots, and measured costs, kept between runs.

    It is beside the data root, where all users of the root find it, or in the user's own cache if that is not writable.
    """
    if study.data.cache:
        return Path(study.data.cache)
    beside = Path(study.data_root).parent / ".cache"
    usable = os.access(beside, os.R_OK | os.X_OK) if beside.exists() else is_writable(beside)
    return beside if usable and beside.parent.is_dir() else cache_root()


def access_of(study: Study) -> Access:
    """The access rights for cached data of a study: those of its data root."""
    root = Path(study.data_root).absolute()
    return Access.of(next(path for path in (root, *root.parents) if path.is_dir()))


def gather(study: Study, provisional: bool = False) -> Facts:
    """The facts of a resolved study. Raises UserError if a base or data are missing.

    With `provisional`, missing datasets are taken from the description of the suite, and missing weights by their name;
    the facts list what is missing.
    """
    roles, cache = study.roles, cache_of(study)
    names = dict.fromkeys((*study.learnt, *roles.pretraining, *roles.adaptation, *roles.held_out))
    missing = _missing(study, names)
    if missing and not provisional:
        raise UserError(_missing_text(study, missing))
    if not provisional or study.suite is None:
        for model in study.models:
            local_base(model)
    models = study.models
    absent = tuple(model.pretrained or "" for model in models if not _is_there(model))
    bases = {key_of(model): _base(model, provisional) for model in models}
    described = study.suite.described() if missing and study.suite is not None else {}
    surveys = _surveys(study, [name for name in names if name not in missing], cache)
    datasets: dict[str, DatasetInfo] = {
        name: described[name] if name in missing else describe(study.data_root, name, cache) for name in names
    }
    streams = {key_of(section): stream_of(study, section, datasets) for section in study.streams}
    _check_tasks(streams.values(), datasets, surveys)
    return Facts(
        datasets={name: _facts_of(study, info, surveys.get(name, {})) for name, info in datasets.items()},
        models={key_of(model): model_facts(study, model, *bases[key_of(model)]) for model in models},
        streams=streams,
        missing=missing + absent,
        notes=tuple(text for name, found in surveys.items() for text in notes(datasets[name], found)),
        experts={task: hash_file(given_file(task, path)) for task, path in study.experts.items()},
    )


def given_file(task: str, path: str) -> Path:
    """The weights file of an expert that is given. Raises UserError if there is none, or several shards."""
    try:
        with Checkpoint.open(path) as found:
            parts = found.files
    except (CheckpointError, OSError) as error:
        raise UserError(f"experts.{task}: {error}") from None
    if len(parts) != 1:
        raise UserError(
            f"experts.{task}: {path} is in {len(parts)} shards; write it as one file first (temporal-merge convert)"
        )
    return parts[0]


def _surveys(study: Study, datasets: Iterable[str], cache: Path) -> dict[str, dict[str, Survey]]:
    """The survey of each dataset by split, for the splits that a step may read. Raises ShardError.

    A train split that is read as it is stored has none: its manifest says enough, and its samples are checked as it is indexed.
    """
    learnt, roles = {*study.learnt, *study.roles.adaptation}, study.roles
    replayed = roles.pretraining if any(cell.recipe.mixture.pretraining > 0 for cell in study.cells) else ()
    found: dict[str, dict[str, Survey]] = {}
    for name in datasets:
        wanted = {TRAIN: name in learnt or name in replayed}
        wanted |= dict.fromkeys(study.splits, name in learnt or name in roles.held_out)
        _announce(
            name, unread_bytes(study.data_root, name, (), cache)
        )  # without a manifest, describing it reads it
        info = describe(study.data_root, name, cache)
        splits = [split for split, read in wanted.items() if read and split not in _stored(study, info)]
        _announce(name, unread_bytes(study.data_root, name, splits, cache))
        found[name] = {
            split: verify(study.data_root, name, split, cache) for split in splits if split in info.splits
        }
    return found


def _announce(name: str, unread: int) -> None:
    """Say on stderr that a dataset is about to be read, if that takes long."""
    if unread >= LARGE_BYTES:
        text = f"{name}: reading its {unread / 1e9:,.1f} GB once, to check shards, labels and pictures"
        print(text, file=sys.stderr, flush=True)


def _stored(study: Study, info: DatasetInfo) -> tuple[str, ...]:
    """The splits whose pictures training cuts out of the originals. Evaluation sees the same pictures either way."""
    train = info.splits.get(TRAIN)
    if train is None or not reads_encoded(study.data.reading, train.samples):
        return ()
    if train.address:
        check_allowed(train.address, study.data.addresses or (), f"the {TRAIN} split of {info.name}")
    return (TRAIN,)


def _facts_of(study: Study, info: DatasetInfo, surveys: Mapping[str, Survey]) -> DatasetFacts:
    facts = replace(DatasetFacts.of(info), stored=_stored(study, info))
    digests = {
        split: content_digest(info.splits[split], survey, scored=split != TRAIN)
        for split, survey in surveys.items()
    }
    digests |= {split: encoded_digest(info.splits[split]) for split in facts.stored}
    return replace(facts, digests={**facts.digests, **digests})


def _check_tasks(
    streams: Iterable[Stream], datasets: Mapping[str, Described], surveys: Mapping[str, Mapping[str, Survey]]
) -> None:
    """Raise PlanError for a task whose classes have no training sample."""
    for task in (task for stream in streams for task in stream.tasks):
        for part in (part for part in task.parts if part.classes is not None):
            names = datasets[part.dataset].classes
            survey = surveys.get(part.dataset, {}).get(TRAIN)
            labels = {label for label, _ in survey.labels} if survey else set(range(len(names)))
            if not any(names.index(name) in labels for name in part.classes or ()):
                raise PlanError(
                    f"task {task.name}: the {TRAIN} split of {part.dataset} has no sample of {', '.join(part.classes or ())}"
                )


def stream_of(study: Study, section: StreamSection, datasets: Mapping[str, Described]) -> Stream:
    """The stream of a stream section. Measurements use the study's own `model`.

    Raises UserError if an order needs a base or data that are missing.
    """
    section = study.filled(section)
    named = datasets_of(section)
    measured = _measured(study, section, named) if section.measured else None
    return make_stream(section, {name: _classes(datasets[name]) for name in named}, measured)


def _classes(info: Described) -> tuple[str, ...]:
    return info.classes if info.kind == "classification" else ()


def _measured(study: Study, section: StreamSection, names: Sequence[str]) -> Mapping[Element, Any]:
    """Measurements of every class with the study's own base; cached, so that only the first plan takes the time."""
    from workers.models.export import export_base
    from workers.scoring.stream_orders import Subject, measure

    order = cast(Literal["performance", "similarity"], section.order)
    model = study.model
    weights, config, _ = base_identity(model, base_of(model))
    with tempfile.TemporaryDirectory() as room:

        def exported() -> Path:
            print(f"measuring the classes for stream.order {section.order}", file=sys.stderr, flush=True)
            source = local_base(model)
            pretrained = str(source) if source else model.pretrained
            export_base(model.config, pretrained, Path(room), model.seed, stated(model))
            return Path(room)

        subject = Subject(fingerprint([weights, config]), exported, study.data_root, cache_of(study))
        return measure(order, subject, names)


def _missing(study: Study, names: Iterable[str]) -> tuple[str, ...]:
    """Datasets of a described suite that its root does not hold."""
    if study.suite is None:
        return ()
    missing = []
    for name in names:
        try:
            folder(study.data_root, name)
        except UserError:
            missing.append(name)
    return tuple(missing)


def _missing_text(study: Study, missing: Sequence[str]) -> str:
    shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return (
        f"data: {study.data_root} lacks {len(missing)} datasets of {study.data.suite}: {shown}; see all with "
        f"`temporal-merge check {study.data.suite} --root {study.data_root}`"
    )


def stated(model: ModelSection) -> dict[str, object]:
    """The keys that `model.preprocess` states."""
    return {} if model.preprocess is None else model.preprocess.model_dump(mode="json", exclude_none=True)


def base_of(model: ModelSection) -> Base:
    """What is known of a base before its weights are read. Raises UserError for a model that a run would refuse."""
    source = local_base(model)
    return find(model.config, str(source) if source else model.pretrained, stated(model))


def base_for_now(model: ModelSection) -> tuple[Base | None, tuple[str, ...]]:
    """Like `base_of`, with its notes. None and the reason if weights are missing or the Hub cannot be reached."""
    try:
        base = base_of(model)
        return base, base.notes
    except ModelError:
        raise
    except UserError as error:
        if _is_there(model) and not _on_hub(model):
            raise
        if not _on_hub(model):
            configuration_of(model.config)
        return None, (str(error),)


def local_base(model: ModelSection) -> Path | None:
    """The directory or file of a base, None for a tag, a hub model or a random base.

    A `model.config` that is a directory contains its weights. Raises UserError for a path that does not exist.
    """
    pretrained = model.pretrained
    if pretrained is None and (model.config.startswith(LOCAL) or Path(model.config).is_dir()):
        pretrained = model.config
    if pretrained is None or not is_path(pretrained):
        return None
    path = Path(pretrained.removeprefix(LOCAL))
    if not path.exists():
        raise UserError(
            f"model.pretrained: {path} does not exist; give a weights directory, an open_clip tag, or hf-hub:NAME"
        )
    return path


def _on_hub(model: ModelSection) -> bool:
    return any(name.startswith(HUB) for name in (model.config, model.pretrained or ""))


def _is_there(model: ModelSection) -> bool:
    try:
        local_base(model)
    except UserError:
        return False
    return True


def _base(model: ModelSection, provisional: bool) -> tuple[Base | None, tuple[str, ...]]:
    if provisional:
        return base_for_now(model)
    base = base_of(model)
    return base, base.notes


def model_facts(study: Study, model: ModelSection, base: Base | None, notes: tuple[str, ...]) -> ModelFacts:
    """The facts of a base, with its costs if they can be measured.

    A model that cannot be measured is an error only if the budget is in GFLOPs.
    """
    weights, config, size = base_identity(model, base)
    costs: dict[str, float] = {}
    ratios: dict[str, float] = {"all": 1.0}
    adapters: dict[str, int] = {}
    for trains, recipe in sorted({cell.recipe.trains: cell.recipe for cell in study.cells}.items()):
        try:
            cost = _cost(study, model, recipe, weights)
        except ModelError:
            raise
        except UserError:
            if any(cell.budget.total_gflops is not None for cell in study.cells):
                raise
            continue
        costs[trains], ratios[trains] = cost["gflops_per_sample"], cost["memory_ratio"]
        if recipe.adapter is not None:
            adapters[trains] = int(cost["trained_bytes"])
        size = int(cost["weights_bytes"])
    _check_recipes(study, model, base)
    training = _training(study, model, base)
    return ModelFacts(weights, config, costs, ratios, size, has_resblocks(base), training, notes, adapters)


def has_resblocks(base: Base | None) -> bool:
    """Whether both towers are open_clip's own transformers according to the configuration; False if it is not available."""
    if base is None:
        return False
    vision, text = base.model_cfg["vision_cfg"], base.model_cfg["text_cfg"]
    plain = "timm_model_name" not in vision and not isinstance(vision.get("layers"), list)
    return plain and "hf_model_name" not in text and "multimodal_cfg" not in base.model_cfg


def _training(study: Study, model: ModelSection, base: Base | None) -> dict[str, str]:
    """What the network determines of its training, if this differs from a CLIP of vision transformers."""
    if base is None or not any(needs_experts(cell.strategy) for cell in study.cells):
        return {}
    found = {} if base.model_cfg.get("init_logit_bias") is None else {"objective": "sigmoid"}
    path = local_base(model)
    if path is not None and not found:
        check_temperature(temperature(path), f"model.pretrained: {path}")
    if study.engine_of(model.config).world > 1:
        from workers.training.budget import has_batch_norm

        if has_batch_norm(base.configuration, model.config):
            found["batch_norm"] = "synchronised"
    return found


def _check_recipes(study: Study, model: ModelSection, base: Base | None) -> None:
    """Raise UserError for a recipe that asks of the network what it cannot do; without its configuration, training finds out."""
    key, asked = key_of(model), study.resources.of(model.config).experts.activation_checkpointing
    recipes = {
        canonical(cell.recipe.model_dump(mode="json")): cell.recipe
        for cell in study.cells
        if needs_experts(cell.strategy) and key_of(cell.model) == key
    }
    unusual = [recipe for recipe in recipes.values() if asked or recipe.asks_network]
    if base is None or not unusual:
        return
    from workers.training.budget import check_recipe

    for recipe in unusual:
        check_recipe(base.configuration, f"model.config {model.config}", recipe, asked)


def base_identity(model: ModelSection, base: Base | None) -> tuple[str, str, int]:
    """(identity of the weights, of the configuration, bytes of the weights or 0 if unknown before loading).

    A configuration in a file is identified by its content, others by name. The preprocessing is included if it differs
    from the one that open_clip would use.
    """
    path = local_base(model) if _is_there(model) else None
    own = own_configuration(model.config)
    described: Any = model.config if own is None or not own.is_file() else read_configuration(own)
    beside = None if path is None else (path if path.is_dir() else path.parent) / CONFIG_FILE
    if beside is not None and beside.is_file():
        described = read_configuration(beside)
    config = fingerprint(described)
    if base is not None and not base.usual:
        config = fingerprint([described, {key: base.preprocess[key] for key in STATED}])
    if path is None:
        seed = model.seed if model.pretrained is None else None
        return fingerprint([described, model.pretrained, model.precision, seed]), config, 0
    with Checkpoint.open(path) as checkpoint:
        parts = checkpoint.files
        digests = [hash_file(part) for part in parts]
    whole = digests[0] if checkpoint.path == parts[0] else fingerprint([hash_file(checkpoint.path), *digests])
    return whole, config, sum(part.stat().st_size for part in parts)


def _cost(study: Study, section: ModelSection, what: Recipe, weights: str) -> dict[str, float]:
    """Costs of training what a recipe trains, measured once per model and cached: GFLOPs per sample, memory relative to full fine-tuning, bytes of
    the weights and of what is trained, in float32.

    Raises ModelError for weights that do not fit the network.
    """
    recipe, trainable, adapter = study.recipe, what.trainable, what.adapter
    key = [weights, section.config, what.trains, recipe.precision, recipe.batch_size]
    kept = cache_of(study) / "costs" / f"{fingerprint(key)[:32]}.json"
    with suppress(ValueError):  # a file cut by a crash of the machine is measured again
        known: dict[str, float] = json.loads(recall(kept) or "")
        if adapter is None or "trained_bytes" in known:  # older files lack it
            return known
    from workers.training.budget import check_fit, measure, memory_ratio

    model: str | Path = (local_base(section) if _is_there(section) else None) or section.config
    if isinstance(model, Path) and not (model / CONFIG_FILE).is_file():
        model = section.config
    cost = measure(model, recipe.batch_size, trainable, recipe.precision, adapter)
    source = local_base(section) if _is_there(section) else None
    if source is not None:
        try:
            check_fit(base_of(section).configuration, section.config, source)
        except IncompatibleCheckpoint as error:
            raise ModelError(f"model.pretrained: {error}") from error
    answer = {
        "gflops_per_sample": cost.gflops_per_sample,
        "memory_ratio": memory_ratio(model, recipe.batch_size, trainable, recipe.precision, adapter),
        "weights_bytes": cost.weights_bytes,
        "trained_bytes": 4 * cost.trained_parameters,
    }
    remember(kept, json.dumps(answer), access_of(study))
    return answer
