"""Statistics of gradients of log p(y | x): the diagonal Fisher information, K-FAC's factors, and the mean size of gradients.

Gradients are squared example by example; the square of a batch's gradient is another quantity, whose cross terms grow with the batch.
E over y is exact (`labels: expectation`), one draw per example from a seeded generator (`sample`), or the true label (`given`).

Invariant: the draw of example n depends on the seed and on n.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from workers.evidence.asked import Asked, Inputs
from workers.evidence.grams import Grams
from workers.evidence.network import Opened
from workers.evidence.passes import CHUNK, Classifier, check, classifier, tapped


@dataclass
class Labels:
    """Which classes of every example count and how much: [examples, classes], rows that sum to 1, given the probabilities."""

    how: str
    given: torch.Tensor | None
    draws: torch.Tensor

    @classmethod
    def of(cls, asked: Asked, inputs: Inputs, count: int) -> "Labels":
        """For `count` examples."""
        draws = torch.from_numpy(np.random.default_rng(asked.seed).random(count))
        given = None if inputs.labels is None else torch.from_numpy(np.asarray(inputs.labels, np.int64))
        return cls("given" if asked.kind == "gradient" else asked.labels, given, draws)

    def weights(self, start: int, log_probabilities: torch.Tensor) -> torch.Tensor:
        """Of the examples from `start` on, float32 on the CPU."""
        p = log_probabilities.detach().double().exp().cpu()
        if self.how == "expectation":
            return p.float()
        stop = start + len(p)
        if self.how == "given":
            assert self.given is not None
            chosen = self.given[start:stop]
        else:
            chosen = (p.cumsum(1) < self.draws[start:stop, None]).sum(1).clamp(max=p.shape[1] - 1)
        return torch.nn.functional.one_hot(chosen, p.shape[1]).float()


@dataclass
class Elements:
    """Sums over examples of a function of each parameter's gradient: of a chunk in float32, of all in float64."""

    sums: dict[str, torch.Tensor]
    part: dict[str, torch.Tensor]
    count: int = 0

    @classmethod
    def of(cls, named: Mapping[str, torch.Tensor]) -> "Elements":
        """Zeros."""
        return cls(
            {name: torch.zeros_like(one, dtype=torch.float64) for name, one in named.items()},
            {name: torch.zeros_like(one, dtype=torch.float32) for name, one in named.items()},
        )

    @torch.no_grad()
    def add(self, name: str, gradient: torch.Tensor, weight: float | None) -> None:
        """Add the squared gradient times its weight; without one, its size."""
        wide = gradient.float()
        if weight is None:
            self.part[name] += wide.abs()
        else:
            self.part[name].addcmul_(wide, wide, value=weight)

    @torch.no_grad()
    def done(self, last: bool) -> None:
        """One more example is complete."""
        self.count += 1
        if last or self.count % CHUNK == 0:
            for name, part in self.part.items():
                self.sums[name] += part
                part.zero_()


def per_example(model: Opened, asked: Asked, inputs: Inputs, towers: str) -> Elements:
    """The sum over examples of E_y of the squared gradient (fisher), or of the gradient's size (gradient)."""
    scores = classifier(model, inputs, towers)
    named = _parameters(model, towers)
    images, found = model.images(inputs), Elements.of(named)
    labels = Labels.of(asked, inputs, len(images))
    embeddings = scores.embeddings()
    for number in range(len(images)):
        log_p = scores.log_probabilities(images[number : number + 1], embeddings)[0]
        check("fisher", log_p)
        weights = labels.weights(number, log_p[None])[0]
        for y in torch.nonzero(weights).reshape(-1).tolist():
            gradients = torch.autograd.grad(
                log_p[y], list(named.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(named, gradients):
                if gradient is not None:
                    found.add(name, gradient, None if asked.kind == "gradient" else float(weights[y]))
        found.done(last=number == len(images) - 1)
    return found


def _parameters(model: Opened, towers: str) -> dict[str, torch.nn.Parameter]:
    """The parameters that the scores depend on, by name."""
    named = dict(model.model.named_parameters())
    return {name: one for name, one in named.items() if towers == "both" or name.startswith("visual.")}


@dataclass
class Factors:
    """K-FAC: Gram matrices of inputs and, under the same names, sums of g g^T of outputs [parts, rows, rows]."""

    inner: Grams = field(default_factory=Grams)
    outer: dict[str, torch.Tensor] = field(default_factory=dict)


def kfac(model: Opened, asked: Asked, inputs: Inputs, towers: str) -> Factors:
    """The factors of every matrix in blocks. Examples pass in chunks; one by one where all of them share the text tower."""
    scores = classifier(model, inputs, towers)
    images, found = model.images(inputs), Factors()
    labels = Labels.of(asked, inputs, len(images))
    size = CHUNK if towers == "image" else 1
    for start in range(0, len(images), size):
        _chunk(scores, images[start : start + size], labels, start, found)
    return found


def _chunk(scores: Classifier, images: torch.Tensor, labels: Labels, start: int, found: Factors) -> None:
    outputs: list[tuple[str, torch.Tensor, Any]] = []

    def take(name: str, how: str, x: torch.Tensor, out: torch.Tensor, chosen: Any) -> None:
        if how == "linear" and ".resblocks." in name and out.requires_grad:
            found.inner.take(name, how, x.detach(), out, chosen)
            outputs.append((name, out, chosen))

    with tapped(scores.opened, take) as counting:
        log_p = scores.log_probabilities(images, scores.embeddings(counting))
    check("kfac", log_p)
    weights = labels.weights(start, log_p).to(log_p.device)
    for y in torch.nonzero(weights.sum(0)).reshape(-1).tolist():
        target = (weights[:, y].sqrt() * log_p[:, y]).sum()
        grads = torch.autograd.grad(target, [out for _, out, _ in outputs], retain_graph=True)
        for (name, _, chosen), gradient in zip(outputs, grads):
            _add(found.outer, name, gradient if chosen is None else gradient[chosen])


def _add(sums: dict[str, torch.Tensor], name: str, gradient: torch.Tensor) -> None:
    flat = gradient.reshape(-1, gradient.shape[-1]).float()
    parts = flat.chunk(3, 1) if name.endswith("in_proj_weight") else (flat,)
    new = torch.stack([part.T @ part for part in parts]).double()
    sums[name] = sums[name] + new if name in sums else new


def means(found: Factors) -> Iterator[tuple[str, torch.Tensor]]:
    """The factors as they are stored: of inputs by name, of outputs by name and `:out`."""
    for name, value in found.inner.means().items():
        yield name, value
        outer = (found.outer[name] / found.inner.rows[name]).cpu()
        yield f"{name}:out", outer if len(outer) > 1 else outer[0]
