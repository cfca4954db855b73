"""Two ranks train the same expert as one rank, also for networks with batch normalisation or a bias."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from tests.servers import free_port
from tests.workers.model_helpers import MODEL_CFG, apart
from workers.jobs import EngineSpec
from workers.models.model import export_base, load
from workers.training.engines.groups import join_group, leave_group
from workers.training.engines.make import make_engine
from workers.training.recipe import Recipe

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 32}
MODELS: dict[str, dict[str, Any]] = {
    "resnet": MODEL_CFG | {"vision_cfg": RESNET},
    "siglip": MODEL_CFG | {"init_logit_bias": -10, "init_logit_scale": math.log(120)},
}
STEPS, BATCH = 3, 8
RUNS = [
    ("resnet", "torch", 0),
    ("siglip", "torch", 0),
    ("resnet", "deepspeed", 0),
    ("resnet", "deepspeed", 3),
    ("siglip", "deepspeed", 2),
]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(BATCH, 3, 32, 32, generator=generator)
            + 2.0 * (torch.arange(BATCH) % 2).view(-1, 1, 1, 1),
            torch.randint(1, 49000, (BATCH, 8), generator=generator),
        )
        for _ in range(STEPS)
    ]


def train(root: Path, name: str, spec: EngineSpec, rank: int = 0) -> tuple[dict[str, torch.Tensor], float]:
    torch.set_num_threads(1)
    recipe = Recipe(lr=1e-3, batch_size=BATCH, precision="fp32")
    engine = make_engine(load(root / name), recipe, STEPS, spec, 0, rank)
    losses = [
        engine.step(images[rank :: spec.world].contiguous(), tokens[rank :: spec.world].contiguous()).loss
        for images, tokens in batches()
    ]
    state = engine.weights()
    engine.close()
    return state, sum(losses)


def on_two_ranks(rank: int, port: int, root: str) -> None:
    join_group(rank, 2, "127.0.0.1", port, "cpu", timeout=120)
    for name, kind, stage in RUNS:
        state, loss = train(Path(root), name, EngineSpec(kind, stage, world=2), rank)  # type: ignore[arg-type]
        torch.save({**state, "loss": torch.tensor(loss)}, f"{root}/{name}-{kind}-{stage}-{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("norm")
    for name, model_cfg in MODELS.items():
        (root / f"{name}.json").write_text(json.dumps({"model_cfg": model_cfg}))
        export_base(str(root / f"{name}.json"), None, root / name, seed=1)
    port = free_port()
    torch.multiprocessing.spawn(on_two_ranks, (port, str(root)), nprocs=2)
    return root


@pytest.mark.fault("F34")
@pytest.mark.parametrize(("name", "kind", "stage"), RUNS)
def test_two_ranks_give_the_expert_of_one(spread: Path, name: str, kind: str, stage: int) -> None:
    alone, loss = train(spread, name, EngineSpec())
    one, other = (torch.load(spread / f"{name}-{kind}-{stage}-{rank}.pt") for rank in (0, 1))
    assert float(one.pop("loss")) == float(other.pop("loss")) == pytest.approx(loss, rel=1e-3)
    assert all(torch.equal(one[key], other[key]) for key in one)
    base = load(spread / name).state_dict()
    floats = [key for key, tensor in alone.items() if tensor.is_floating_point()]
    running = [key for key in floats if "running" in key]
    assert (name == "resnet") == bool(running)
    for key in running:
        assert torch.allclose(one[key], alone[key], rtol=1e-3, atol=1e-4), key
    trained = [key for key in floats if key not in running]
    ours, theirs, start = ({key: state[key] for key in trained} for state in (one, alone, base))
    assert apart(ours, theirs, start) < 0.02


def test_bias_means_the_sigmoid_loss_and_no_bound_of_the_temperature(spread: Path) -> None:
    base = load(spread / "siglip")
    state, _ = train(spread, "siglip", EngineSpec())
    assert float(state["logit_scale"]) == pytest.approx(math.log(120), abs=0.01)
    assert not torch.equal(state["logit_bias"], base.logit_bias)
    images, tokens = batches()[0]
    with torch.no_grad():
        image, text, scale, bias = base.train()(images, tokens)
        logits = scale * image @ text.T + bias
        first = -torch.nn.functional.logsigmoid(logits * (2 * torch.eye(BATCH) - 1)).sum() / BATCH
    engine = make_engine(
        load(spread / "siglip"), Recipe(batch_size=BATCH, precision="fp32"), 1, EngineSpec(), 0
    )
    assert engine.step(images, tokens).loss == pytest.approx(float(first), rel=1e-5)
