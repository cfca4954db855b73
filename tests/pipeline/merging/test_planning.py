"""The plan of a merge: a 70B one from headers alone, and numbers that are those of the merge itself."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from merge_service import techniques
from merge_service.blocks import search
from merge_service.checkpoints import Checkpoint
from merge_service.checkpoints.header import build_header
from merge_service.engine.prepare import prepare
from merge_service.engine.survey import Surveyor
from merge_service.engine.task import Input, MergeTask
from merge_service.merge import merge
from merge_service.merging.plans import plan as planning
from merge_service.merging.plans.asked import _Recorder
from tests.conftest import Answer
from tests.merge_service import measured, toys

HIDDEN, WIDE, NARROW, WORDS, LAYERS = 8192, 28672, 1024, 128256, 80
LAYER = {
    "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE), "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (NARROW, HIDDEN),
    "self_attn.v_proj": (NARROW, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
}  # fmt: skip
ENDS = {"model.embed_tokens": (WORDS, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (WORDS, HIDDEN)}


def seventy(folder: Path) -> Path:
    """A Llama of 70B in shards of which only headers are on the disk."""
    shapes = ENDS | {f"model.layers.{at}.{name}": s for at in range(LAYERS) for name, s in LAYER.items()}
    layout = {f"{name}.weight": ("BF16", shape) for name, shape in shapes.items()}
    where, names = {}, list(layout)
    folder.mkdir()
    for number, first in enumerate(range(0, len(names), 50)):
        part = {name: layout[name] for name in names[first : first + 50]}
        file = folder / f"model-{number + 1:05d}.safetensors"
        head, infos = build_header(part, {"format": "pt"})
        with file.open("wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(info.nbytes for info in infos.values()))
        where |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return folder


def planned(cli: Callable[..., Answer], *arguments: object, code: int = 0) -> dict:
    answer = cli("merge", "--plan", "--json", *arguments)
    assert answer.code == code, answer.err
    return json.loads(answer.out)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a file may be read."""

    def refused(*_: object) -> None:
        raise AssertionError("a plan read a tensor")

    monkeypatch.setattr(Checkpoint, "raw", refused)
    monkeypatch.setattr(planning, "measured", lambda every: None)


def test_plan_of_70b_comes_from_headers_alone_and_checks_the_room(
    tmp_path: Path, cli: Callable[..., Answer], unread: None
) -> None:
    base, *experts = (seventy(tmp_path / name) for name in ("base", "a", "b"))
    out = ("--out", tmp_path / "out", "--shard-size", "5GB", "--base", base, *experts)
    found = planned(cli, "--technique", "ties", *out, "--threads", 8, code=2)
    weights = 2 * (LAYERS * sum(map(np.prod, LAYER.values())) + sum(map(np.prod, ENDS.values())))
    assert found["written_bytes"] == found["disk"]["needed_bytes"] == weights
    assert found["shards"] == 30 and found["inputs_bytes"] // weights == 3
    assert 2.9 < found["passes"] < 3.2  # named by content, thresholds over towers, merged
    assert found["throughput"]["source"] == "assumed" and found["memory_bytes"] < 1e9
    assert found["seconds"] == pytest.approx(
        (found["read_bytes"]["total"] + weights) / (8 * planning.ASSUMED), abs=0.1
    )
    assert not (tmp_path / "out").exists()
    tensor = planned(cli, "--technique", "ties", "--set", "granularity=tensor", *out, code=2)
    assert tensor["passes"] < 2.01 and "no pass of their own" in " ".join(tensor["notes"])
    shares = planned(cli, "--technique", "average", *out, "--workers", 4, code=2)["worker_bytes"]
    assert len(shares) == 4 and sum(shares) == 3 * weights
    assert max(shares) < 1.1 * min(shares)


def test_plan_without_room_says_so_after_the_numbers_and_ends_with_2(
    tmp_path: Path, cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toys.save(tmp_path / "m.safetensors", {"a.weight": np.zeros((8, 8), np.float32)})
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda place: SimpleNamespace(free=9))
    answer = cli(
        "merge", "--plan", "--technique", "average", "--out", str(tmp_path / "o.safetensors"), str(model)
    )
    assert answer.code == 2 and "nothing is written" in answer.out
    assert "make room, or give another --out" in answer.err
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("name", [n for n in measured.GIVEN if not techniques.get(n).evidence])
def test_plan_asks_the_questions_of_the_merge(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kinds; a search that misses asks more often."""
    monkeypatch.setattr(search, "GATHER", 16)
    rng = np.random.default_rng(2)
    base = toys.towers(rng)
    count = techniques.get(name).arity or 3
    models = [base, *(toys.moved(rng, base) for _ in range(count))]
    technique = techniques.get(name)
    paths = [toys.save(tmp_path / f"{at}.safetensors", one) for at, one in enumerate(models)]
    opened = [Checkpoint.open(path) for path in paths]
    inputs = [Input(f"t{at}", at, weights) for at, weights in enumerate(opened[1:], 1)]
    params = technique.resolve({}, "merge" if "merge" in technique.forms else "fold")
    task = MergeTask.of(technique, params, opened[0], inputs)
    kinds = []
    for answer in (Surveyor(task, task.combined).answer, _Recorder(task).answer):
        seen: set[str] = set()

        def ask(question, answer=answer, seen=seen):
            seen.add(type(question).__name__)
            return answer(question)

        prepare(task, ask)
        kinds.append(seen)
    assert kinds[0] == kinds[1]


def test_plan_counts_what_is_written_and_an_existing_out_is_refused(
    tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    rng = np.random.default_rng(1)
    base = toys.towers(rng)
    paths = [
        toys.save(tmp_path / f"{at}.safetensors", m) for at, m in enumerate([base, toys.moved(rng, base)])
    ]
    out = tmp_path / "out.safetensors"
    found = planned(cli, "--technique", "ties", "--base", paths[0], "--out", out, paths[1])
    merge("ties", {}, paths[0], paths[1:], out)
    with Checkpoint.open(out) as made:
        assert found["written_bytes"] == sum(info.nbytes for info in made.tensors.values())
    assert found["read_bytes"]["sha256 and ids"] == sum(path.stat().st_size for path in paths)
    refused = cli("merge", "--plan", "--technique", "average", "--out", str(out), str(paths[0]))
    assert refused.code == 2 and "is there already" in refused.err


def test_recipes_are_planned_and_chains_merge_by_merge(tmp_path: Path, cli: Callable[..., Answer]) -> None:
    layers = {f"model.layers.{at}.mlp.weight": np.ones((4, 4), np.float32) * at for at in range(4)}
    models = [toys.save(tmp_path / f"{n}.safetensors", {k: v + n for k, v in layers.items()}) for n in (0, 1)]
    part = "{{sources: [{{model: {}, layer_range: [{}, {}]}}]}}"
    cut = f"[{part.format(models[0], 0, 3)}, {part.format(models[1], 1, 4)}]"
    file = tmp_path / "recipe.yaml"
    file.write_text(f"merge_method: passthrough\nslices: {cut}\ndtype: float32\n")
    found = planned(cli, file, "--out", tmp_path / "out.safetensors")
    assert found["written_bytes"] == 6 * 4 * 4 * 4 and not (tmp_path / "out.safetensors").exists()
    text = f"name: one\nmerge_method: linear\nmodels: [{{model: {models[0]}, parameters: {{weight: 1}}}}]\n"
    file.write_text(f"{text}---\nmerge_method: linear\nmodels: [{{model: one, parameters: {{weight: 1}}}}]\n")
    answer = cli("merge", "--plan", str(file), "--out", str(tmp_path / "out.safetensors"))
    assert answer.code == 2 and "planned merge by merge" in answer.err
