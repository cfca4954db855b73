"""Statistics of whole tensors are exact for any division of a model and any number of processes."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from merge_service import techniques
from merge_service.blocks import search
from merge_service.blocks import spans as engine
from merge_service.blocks.questions import Findings, together
from merge_service.checkpoints import Checkpoint
from merge_service.engine.prepare import prepare
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.merge import merge
from tests.merge_service import plain_extra, toys


def big(room: Path) -> tuple[dict, list[dict], list[Path]]:
    """Models large enough for thresholds to be counted, not sorted, and for spans and rows to cut across each other."""
    rng = np.random.default_rng(7)
    shapes = {"visual.a": (139, 503), "b": (20_000,), "logit_scale": ()}
    base = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in shapes.items()}
    experts = [
        {n: np.float32(v + 0.1 * rng.standard_normal(v.shape) ** 3) for n, v in base.items()}
        for _ in range(3)
    ]
    paths = [toys.save(room / f"{i}.safetensors", model) for i, model in enumerate([base, *experts])]
    return base, experts, paths


VARIANTS = [
    ("breadcrumbs", {"granularity": "tower"}),
    ("dare", {"rescale": "l1"}),
    ("della", {"rescale": "l1"}),
    ("dare_ties", {"trim": 0.2, "rescale": "l1"}),
    ("sce", {}),
    ("sce", {"density": 0.5, "erase_unselected": False}),
    ("pcb", {"winsorize": 0.01}),
    ("pcb", {"inter_balance": "pairs", "granularity": "model"}),
    ("knots_ties", {"scope": "matrices"}),
]


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches in many narrow steps, as in large models."""
    for bound, value in {"GATHER": 1 << 10, "BINS": 1 << 9, "COUNTS": 1 << 12, "SAMPLE": 1 << 14}.items():
        monkeypatch.setattr(search, bound, value)


@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)
def test_numbers_of_whole_tensors_are_exact_in_any_block_on_any_thread(
    tmp_path: Path, small_counts: None, name: str, params: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, paths = big(tmp_path)
    ids, seen = ["t1", "t2", "t3"], set()
    for block, threads, counting in ((1, 1, engine.GRAIN), (1 << 20, 2, 1 << 17)):
        monkeypatch.setattr("merge_service.engine.survey.BLOCK", counting)
        out = tmp_path / "out.safetensors"
        report = merge(name, params, paths[0], paths[1:], out, ids=ids, block=block, threads=threads)
        seen.add(out.read_bytes())
    assert len(seen) == 1
    expected = plain_extra.merge(name, report.params, base, experts, ids)
    result = toys.load(tmp_path / "out.safetensors")
    for tensor in ("visual.a", "b"):
        wrong = ~np.isclose(result[tensor], expected[tensor], rtol=1e-5, atol=1e-5)
        assert wrong.mean() < 1e-4, (
            tensor
        )  # a sum that rounds to another sign moves an element far, but very few do


@pytest.mark.parametrize(("name", "params"), [("ties", {}), *VARIANTS], ids=str)
def test_parts_of_a_model_that_are_asked_apart_find_the_same_numbers(
    tmp_path: Path, small_counts: None, name: str, params: dict
) -> None:
    _, _, paths = big(tmp_path)
    technique = techniques.get(name)
    opened = [Checkpoint.open(path) for path in paths]

    inputs = [Input(f"t{i}", i, weights) for i, weights in enumerate(opened[1:], 1)]
    task = MergeTask.of(technique, technique.resolve(params, "merge"), opened[0], inputs)
    machines = [Surveyor(task, task.merged[:1]), Surveyor(task, task.merged[1:])]

    def ask(question):
        sent = pickle.dumps(question)
        return together([pickle.loads(pickle.dumps(one.answer(pickle.loads(sent)))) for one in machines])

    whole = prepare(task, Surveyor(task, task.combined).answer)
    assert whole == prepare(task, ask) and whole != Findings()
