"""How learned values make a model, and how a gradient of the model's parameters becomes one of the values.

No graph goes through the merge: the model is filled piece by piece from mapped files, and a coefficient's gradient is the product of
the parameter's gradient with the expert's task vector. Invariant: `pull` is the derivative of `fill`.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from merge_service.anatomy import anatomy_of
from workers.learning.adam import Tensors
from workers.learning.members import Members
from workers.learning.wanted import Wanted

EVERYWHERE = "*"


class Blend(Protocol):
    """`values` are learned, by the name that they have in the file. `each`: their first dimension are the experts."""

    values: Tensors
    each: bool

    def fill(self, step: int) -> None:
        """Put the merge into the model."""

    def pull(self, gradients: Mapping[str, torch.Tensor]) -> Tensors:
        """Gradients of the values, of those of the parameters."""

    def settle(self) -> None:
        """Bring values back to where they may be, after a step."""


class Factors:
    """θ0 + Σ c_i τ_i with a factor per expert, in every tensor or (under `*`) in all. `squash`: c = tanh(w), and w is learned."""

    each = True

    def __init__(self, wanted: Wanted, members: Members, names: Sequence[str]) -> None:
        self.members, self.names, self.wanted = members, names, wanted
        self.squash = wanted.row.loss == "labels"
        start = torch.tensor(wanted.starts(len(members.experts)), dtype=torch.float64)
        keys = [EVERYWHERE] if wanted.granularity == "model" else names
        self.values: Tensors = {key: (start.atanh() if self.squash else start).clone() for key in keys}

    def key(self, name: str) -> str:
        """The value that serves a parameter."""
        return EVERYWHERE if EVERYWHERE in self.values else name

    def factors(self, name: str) -> list[float]:
        """The factors of a parameter."""
        value = self.values[self.key(name)]
        return (value.tanh() if self.squash else value).tolist()

    def fill(self, step: int) -> None:
        for name in self.names:
            put(self.members, name, self.factors(name))

    def pull(self, gradients: Mapping[str, torch.Tensor]) -> Tensors:
        found = {key: torch.zeros_like(one) for key, one in self.values.items()}
        for name in self.names:
            flat = gradients[name].reshape(-1)
            for where in self.members.pieces(name):
                part = flat[where].double()
                for number, vector in enumerate(self.members.vectors(name, where)):
                    found[self.key(name)][number] += float(torch.dot(part, vector.double()))
        for key, value in found.items():
            if self.squash:
                value.mul_(1 - self.values[key].tanh() ** 2)
            value[: self.wanted.frozen] = 0
        return found

    def settle(self) -> None:
        if self.wanted.clamp:
            for value in self.values.values():
                value[self.wanted.frozen :].clamp_(0, 1)


class Columns:
    """Σ W_i diag(c_i): a factor per expert and input of a map (DAM); biases and scalars have one, norms and tables one per channel."""

    each = True

    def __init__(self, wanted: Wanted, members: Members, names: Sequence[str]) -> None:
        self.members, self.names = members, names
        self.anatomy = anatomy_of({name: info.shape for name, info in members.base.tensors.items()})
        start = torch.tensor(wanted.starts(len(members.experts)), dtype=torch.float64)
        self.values: Tensors = {name: start[:, None].repeat(1, self.columns(name)) for name in names}

    def columns(self, name: str) -> int:
        """How many factors an expert has in a parameter."""
        shape, linear = self.members.base.tensors[name].shape, self.anatomy.linear(name)
        if not shape or (len(shape) == 1 and name.endswith("bias")):
            return 1
        if self._by_row(name):
            return int(shape[0])
        return (
            int(shape[0]) if len(shape) == 1 else int(np.prod(shape)) // self._rows(name, linear is not None)
        )

    def fill(self, step: int) -> None:
        with torch.no_grad():
            for name in self.names:
                parameter = self.members.parameter(name)
                merged = torch.zeros_like(parameter).view(self._form(name))
                for number, factors in enumerate(self.values[name]):
                    merged += self._of(number, name) * self._spread(name, factors).to(merged)
                parameter.copy_(merged.view(parameter.shape))

    def pull(self, gradients: Mapping[str, torch.Tensor]) -> Tensors:
        found = {}
        for name in self.names:
            gradient = gradients[name].reshape(self._form(name)).double()
            over = 1 if self._by_row(name) else 0
            products = [
                (gradient * self._of(number, name)).sum(over) for number in range(len(self.members.experts))
            ]
            rows = torch.stack(products).cpu()
            found[name] = rows if self.columns(name) > 1 else rows.sum(1, keepdim=True)
        return found

    def settle(self) -> None:
        return

    def _by_row(self, name: str) -> bool:
        """Whether the input of the map is the first dimension."""
        linear = self.anatomy.linear(name)
        return linear is not None and linear.first and not linear.diagonal

    def _rows(self, name: str, is_map: bool) -> int:
        shape = self.members.base.tensors[name].shape
        return int(shape[0]) if is_map and len(shape) > 2 else int(np.prod(shape[:-1]))

    def _form(self, name: str) -> tuple[int, int]:
        """A parameter as rows and columns of which one dimension has the factors."""
        size, count = self.members.base.tensors[name].numel, self.columns(name)
        if self._by_row(name):
            return count, size // count
        return (1, size) if count == 1 else (size // count, count)

    def _of(self, number: int, name: str) -> torch.Tensor:
        return self.members.of_expert(number, name).reshape(self._form(name))

    def _spread(self, name: str, factors: torch.Tensor) -> torch.Tensor:
        return factors[:, None] if self._by_row(name) else factors[None]


class Masks:
    """θ0 + start · m Σ τ_i, m = sigmoid((x + logit u) / T) over its mean per tensor; u is drawn anew for every step and tensor."""

    each = False

    def __init__(self, wanted: Wanted, members: Members, names: Sequence[str]) -> None:
        self.members, self.names, self.wanted = members, names, wanted
        self.values: Tensors = {name: torch.zeros_like(members.parameter(name)).detach() for name in names}
        self.start = wanted.starts(len(members.experts))[0]
        self.step = 0

    def fill(self, step: int) -> None:
        self.step = step
        with torch.no_grad():
            for name in self.names:
                kept = self._kept(name)
                flat = self.members.parameter(name).view(-1)
                mask = (kept / kept.mean()).float()
                for where in self.members.pieces(name):
                    flat[where] = self.members.of_base(name, where) + mask[where] * self._sum(name, where)

    def pull(self, gradients: Mapping[str, torch.Tensor]) -> Tensors:
        found = {}
        with torch.no_grad():
            for name in self.names:
                kept, flat = self._kept(name), gradients[name].reshape(-1)
                mean, pulled = kept.mean(), torch.empty_like(kept)
                for where in self.members.pieces(name):
                    pulled[where] = flat[where].double() * self._sum(name, where)
                pulled -= (pulled * kept).sum() / (mean * kept.numel())
                pulled *= kept * (1 - kept) / (self.wanted.temperature * mean)
                found[name] = pulled.float().view_as(self.values[name])
        return found

    def settle(self) -> None:
        return

    def _sum(self, name: str, where: slice) -> torch.Tensor:
        return sum(self.members.vectors(name, where)) * self.start  # type: ignore[return-value]

    def _kept(self, name: str) -> torch.Tensor:
        logits = self.values[name].view(-1).double()
        seeds = [self.wanted.seed, self.step, zlib.crc32(name.encode())]
        u = torch.from_numpy(np.random.default_rng(seeds).random(logits.numel())).to(logits.device)
        return torch.sigmoid((logits + u.clamp(1e-12, 1 - 1e-12).logit()) / self.wanted.temperature)


def put(members: Members, name: str, factors: Sequence[float]) -> None:
    """θ0 + Σ c_i τ_i into a parameter of the model."""
    with torch.no_grad():
        flat = members.parameter(name).view(-1)
        for where in members.pieces(name):
            merged = members.of_base(name, where)
            for factor, vector in zip(factors, members.vectors(name, where)):
                merged += vector * factor
            flat[where] = merged


def blend_of(wanted: Wanted, members: Members, names: Sequence[str]) -> Blend:
    """How the values of a method make a model."""
    if wanted.row.technique == "dam":
        return Columns(wanted, members, names)
    return (Masks if wanted.row.technique == "concrete" else Factors)(wanted, members, names)
