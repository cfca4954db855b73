"""A study that measures and learns: its numbers are those of plain torch and numpy."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.numpy import load_file

from merge_service.checkpoints import WEIGHTS_FILE
from merge_service.statistics import Statistics
from pipeline.kinds.specs import MeasureSpec, MergeSpec
from pipeline.plan.steps import Step
from pipeline.workspace.workspace import Workspace
from tests.pipeline.run.test_measured_run import carried_out, last_merge
from tests.world import TASKS, World, _samples

STEPS, RATE, START = 20, 0.05, 0.3
ROWS = 36
"""All of a task, so that nothing is drawn."""
STUDY: dict[str, Any] = {
    "name": "seen",
    "stream": {"tasks": [*TASKS[:2]]},
    "grid": {
        "strategies": [{"init": "base", "deploy": "all", "technique": ["regmean", "adamerging", "average"]}]
    },
    "statistics": {"examples": ROWS},
    "learning": {
        "steps": STEPS, "learning_rate": RATE, "start": START, "granularity": "model",
        "batch_size": ROWS, "examples": ROWS,
    },
    "budget": {"steps_per_task": 6},
    "resources": {"experts": {"checkpoint_every": 0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def quiet(world: World, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The study, carried out in this process."""
    found = Workspace.open(world.study(**STUDY), out=tmp_path_factory.mktemp("seen") / "out")
    carried_out(found)
    return found


def model_of(workspace: Workspace, fingerprint: str) -> torch.nn.Module:
    """The model of an artifact as open_clip opens it."""
    place = f"local-dir:{workspace.weights(fingerprint)}"
    return open_clip.create_model_and_transforms(place)[0].eval()


def pictures(number: int) -> torch.Tensor:
    """The training images of a task as the model takes them."""
    images = np.stack([one.image for one in _samples(np.random.default_rng(number), number, ROWS)])
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def weights_of(workspace: Workspace, step: Step) -> tuple[dict, list[str], list[dict]]:
    """Base, fingerprints of the experts, and their weights, of a merge."""
    spec = MergeSpec.of(step.spec)
    names = [expert for _, expert in spec.members]
    read = [load_file(workspace.weights(one) / WEIGHTS_FILE) for one in (spec.base, *names)]
    return read[0], names, read[1:]


def test_gram_and_regmean_of_a_run_are_those_of_hooks_and_least_squares(quiet: Workspace) -> None:
    step = last_merge(quiet, "regmean")
    _, names, experts = weights_of(quiet, step)
    merged = load_file(quiet.weights(step.fingerprint) / WEIGHTS_FILE)
    key = "visual.transformer.resblocks.1.mlp.c_proj"
    grams = []
    for number, (expert, (_, measured)) in enumerate(zip(names, MergeSpec.of(step.spec).statistics)):
        model, seen = model_of(quiet, expert), []
        layer = model.get_submodule(key)
        layer.register_forward_hook(lambda module, x, y, seen=seen: seen.append(x[0].flatten(0, -2)))
        with torch.no_grad():
            model.encode_image(pictures(number))
        (x,) = (one.double().numpy() for one in seen)
        grams.append(x.T @ x / len(x))
        file = MeasureSpec.of(quiet.plan.steps[measured].spec).file_of(expert)
        with Statistics(quiet.weights(measured) / file) as held:
            assert held.about.examples == ROWS and held.about.rows[f"{key}.weight"] == len(x)
            np.testing.assert_allclose(held.get(f"{key}.weight"), grams[-1], rtol=1e-4, atol=1e-6)
    shrunk = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
    targets = sum(gram @ one[f"{key}.weight"].T.astype(float) for gram, one in zip(shrunk, experts))
    solved = np.linalg.lstsq(sum(shrunk), targets, rcond=None)[0].T
    np.testing.assert_allclose(merged[f"{key}.weight"], solved, rtol=1e-3, atol=1e-5)
    bias = (experts[0][f"{key}.bias"] + experts[1][f"{key}.bias"]) / 2
    np.testing.assert_allclose(merged[f"{key}.bias"], bias, atol=1e-6)


class Plain:
    """AdaMerging with a coefficient per expert, by autograd through the merge and torch's own Adam."""

    def __init__(self, workspace: Workspace, base: dict, experts: list[dict]) -> None:
        self.base = {name: torch.from_numpy(one) for name, one in base.items()}
        self.taus = [
            {name: torch.from_numpy(one[name]) - self.base[name] for name in self.base} for one in experts
        ]
        self.place = f"local-dir:{workspace.weights(next(iter(workspace.plan.bases)))}"
        self.encode = Image(open_clip.create_model_and_transforms(self.place)[0].eval())

    def merged(self, factors: Any) -> dict[str, torch.Tensor]:
        return {
            name: start + sum(factor * tau[name] for factor, tau in zip(factors, self.taus))
            for name, start in self.base.items()
        }

    def head(self, number: int) -> torch.Tensor:
        """Embeddings of a task's classes by the merge that learning begins with."""
        model = open_clip.create_model_and_transforms(self.place)[0].eval()
        model.load_state_dict(self.merged([START] * len(self.taus)))
        words = [f"a {one} {TASKS[number]} square" for one in ("dark", "middle", "light")]
        with torch.no_grad():
            return model.encode_text(open_clip.get_tokenizer(self.place)(words), normalize=True)

    def learn(self, start: list[float]) -> tuple[list[float], list[float]]:
        """The coefficients, and the loss before every step."""
        factors = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        heads = [self.head(number) for number in range(len(self.taus))]
        adam, losses = torch.optim.Adam([factors], RATE), []
        for _ in range(STEPS):
            merged = {f"model.{name}": one.float() for name, one in self.merged(factors).items()}
            total = 0.0
            for number, head in enumerate(heads):
                features = torch.func.functional_call(self.encode, merged, (pictures(number),))
                log_p = (self.base["logit_scale"].exp() * features @ head.T).log_softmax(1)
                total = total - (log_p.exp() * log_p).sum(1).mean()
            losses.append(float(total.detach()))
            adam.zero_grad()
            total.backward()
            adam.step()
            with torch.no_grad():
                factors.clamp_(0, 1)
        return factors.tolist(), losses


class Image(torch.nn.Module):
    """The image tower as a module's forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(images, normalize=True)


def test_coefficients_of_a_run_are_those_of_autograd_through_the_merge(quiet: Workspace) -> None:
    step = last_merge(quiet, "adamerging")
    base, _, experts = weights_of(quiet, step)
    first, _ = Plain(quiet, base, experts[:1]).learn([START])
    factors, losses = Plain(quiet, base, experts).learn([first[0], START])
    (learned,) = set(dict(MergeSpec.of(step.spec).statistics).values())
    (file,) = quiet.weights(learned).glob("*.safetensors")
    with Statistics(file) as held:
        np.testing.assert_allclose(held.get("*"), factors, atol=2e-3)
        np.testing.assert_allclose(held.about.losses, losses, rtol=1e-4)
        kept = held.get("*")
    assert abs(kept - START).max() > 0.05 and losses[-1] < losses[0]
    merged = load_file(quiet.weights(step.fingerprint) / WEIGHTS_FILE)
    for name, start in base.items():
        used = kept if name.startswith("visual.") else [START] * 2
        taus = [one[name].astype(float) - start for one in experts]
        right = start if name == "logit_scale" else start + sum(c * tau for c, tau in zip(used, taus))
        np.testing.assert_allclose(merged[name], right, rtol=1e-5, atol=1e-6, err_msg=name)
