"""What a plan must know of the world: which base, which data, what a training sample costs.

Invariant: facts describe content, never place: the same base and the same shards give the same facts on any machine.
Gathering them trains nothing and needs no cluster; torch is loaded only when a budget in GFLOPs asks for a measurement.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from merge_service.checkpoint import CONFIG_FILE, locate
from merge_service.errors import UserError
from pipeline.artifact import hash_file
from pipeline.config import Study
from pipeline.fingerprint import fingerprint
from pipeline.steps import DatasetFacts, Facts, Step
from workers.data.manifest import describe, verify

LOCAL = "local-dir:"


def ensure_data(study: Study) -> None:
    """Write the mini suite on first use; any other data must be there already."""
    if study.data.suite == "mini" and not (Path(study.data_root) / "suite.json").is_file():
        from workers.data.mini import build

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        say(f"{study.data_root} is not there yet: writing the mini suite out of installed packages")
        build(Path(study.data_root), say, min(4, os.cpu_count() or 1))


def cache_of(study: Study) -> Path:
    """Where decoded splits, indices of foreign roots and measured costs are kept between runs."""
    return Path(study.data.cache or Path(study.data_root).parent / ".cache")


def gather(study: Study) -> Facts:
    """The facts of a resolved study. Raises UserError for a base or data that are not there."""
    cache = cache_of(study)
    roles = study.roles
    names = dict.fromkeys((*roles.tasks, *roles.pretraining, *roles.adaptation, *roles.held_out))
    datasets = {name: DatasetFacts.of(describe(study.data_root, name, cache)) for name in names}
    weights, config, size = base_identity(study)
    costs, ratios, in_training = _measured(study, weights)
    return Facts(weights, datasets, config, costs, ratios, in_training or size)


def check_shards(study: Study, steps: Iterable[Step]) -> None:
    """Read every shard that these steps read, whole, before any of them starts; once found whole, it is not read again.

    Raises ShardError naming the shard: missing, cut, flipped, short or with members that have no place there.
    """
    cache = cache_of(study).absolute()
    sources = {
        (entry["dataset"], entry["split"]): None
        for step in steps
        for role in ("update", "buffer", "pretraining", "datasets")
        for entry in step.spec.get(role, ())
    }
    for dataset, split in sources:
        verify(study.data_root, dataset, split, cache)


def local_base(study: Study) -> Path | None:
    """The directory or file that the base comes from, None for a tag, a hub model or a random base."""
    pretrained = study.model.pretrained
    if pretrained is None or pretrained.startswith("hf-hub:"):
        return None
    path = Path(pretrained.removeprefix(LOCAL))
    if path.exists():
        return path
    if pretrained.startswith(LOCAL) or "/" in pretrained:
        raise UserError(
            f"model.pretrained: {path} does not exist; give a weights directory, an open_clip tag, or hf-hub:NAME"
        )
    return None


def base_identity(study: Study) -> tuple[str, str, int]:
    """(identity of the weights, of the configuration, bytes of the weights or 0 if unknown before loading)."""
    model, path = study.model, local_base(study)
    if path is None:
        seed = model.seed if model.pretrained is None else None
        return (
            fingerprint([model.config, model.pretrained, model.precision, seed]),
            fingerprint(model.config),
            0,
        )
    weights, config = locate(path), path / CONFIG_FILE
    described = json.loads(config.read_text()) if config.is_file() else model.config
    return hash_file(weights), fingerprint(described), weights.stat().st_size


def _measured(study: Study, weights: str) -> tuple[dict[str, float], dict[str, float], int]:
    """GFLOPs per sample and memory ratio by what is trained, and the bytes of the weights as they are in training.

    A model that cannot be measured is an error only where the budget is in GFLOPs.
    """
    costs: dict[str, float] = {}
    ratios: dict[str, float] = {"all": 1.0}
    size = 0
    for trainable in sorted({cell.recipe.trainable for cell in study.cells}):
        try:
            cost = _cost(study, trainable, weights)
        except UserError:
            if any(cell.budget.total_gflops is not None for cell in study.cells):
                raise
            continue
        costs[trainable], ratios[trainable] = cost["gflops_per_sample"], cost["memory_ratio"]
        size = int(cost["weights_bytes"])
    return costs, ratios, size


def _cost(study: Study, trainable: str, weights: str) -> dict[str, float]:
    """Measured once per model and kept: GFLOPs per sample, memory against full fine-tuning, bytes of the weights."""
    key = [weights, study.model.config, trainable, study.recipe.precision, study.recipe.batch_size]
    kept = cache_of(study) / "costs" / f"{fingerprint(key)[:32]}.json"
    if kept.is_file():
        answer: dict[str, float] = json.loads(kept.read_text())
        return answer
    from workers.budget import measure, memory_ratio

    model, recipe = local_base(study) or study.model.config, study.recipe
    if isinstance(model, Path) and not (model / CONFIG_FILE).is_file():
        model = study.model.config
    cost = measure(model, recipe.batch_size, trainable, recipe.precision)
    answer = {
        "gflops_per_sample": cost.gflops_per_sample,
        "memory_ratio": memory_ratio(model, recipe.batch_size, trainable, recipe.precision),
        "weights_bytes": cost.weights_bytes,
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(answer))
    temporary.replace(kept)
    return answer
