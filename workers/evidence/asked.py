"""What a measurement is asked for, and the arrays that it is made on, checked before anything is computed.

Invariant: which rows are drawn depends on their number, `examples` and `seed` alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from merge_service.errors import UserError
from merge_service.statistics import MEASURED

NAMES = ("images", "tokens", "labels", "head", "logit_scale")
LABELS = ("sample", "expectation", "given")
EXAMPLES = {"gradient": 128}
"""How many examples are drawn by default, where it is not 256."""
COMMON = ("examples", "seed", "precision", "device")
TAKES = {
    "gram": ("scope",),
    "fisher": ("labels", "towers"),
    "kfac": ("labels", "towers"),
    "gradient": ("labels", "towers"),
}
"""What bears on each kind besides `COMMON`; `gradient` takes the true labels and no others."""


@dataclass(frozen=True)
class Asked:
    """A kind and its parameters. `examples`: None is the kind's default. `towers`: None is both where the inputs have tokens of class
    prompts, else image (K-FAC: image where they have a head). `labels`: of which classes gradients are taken.
    `scope`: of all maps, or of the matrices in blocks alone (gram).
    """

    kind: str
    examples: int | None = None
    seed: int = 0
    labels: Literal["sample", "expectation", "given"] = "sample"
    towers: Literal["image", "both"] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    scope: Literal["all", "blocks"] = "all"

    @classmethod
    def of(cls, kind: str, given: Mapping[str, Any]) -> "Asked":
        """What a person asks for; None is a default. Raises UserError for an unknown kind or parameter, and one without effect."""
        given = {name: value for name, value in given.items() if value is not None}
        known = (*COMMON, *TAKES.get(kind, ()))
        for name in given if kind in TAKES else ():
            if name not in known:
                raise UserError(
                    f"{kind} has no parameter {name!r}{_near(name, known)}; it has {', '.join(known)}"
                )
        if kind == "gradient" and given.get("labels", "given") != "given":
            raise UserError(
                f"gradient: labels = {given['labels']!r}, and it takes the true labels: leave labels out"
            )
        return cls(kind, **given)

    def __post_init__(self) -> None:
        if self.kind not in MEASURED:
            raise UserError(
                f"there is no statistic {self.kind!r}{_near(self.kind, MEASURED)}; choose of {', '.join(MEASURED)}"
            )
        for name, allowed in (
            ("labels", LABELS),
            ("towers", ("image", "both", None)),
            ("precision", ("fp32", "bf16")),
            ("scope", ("all", "blocks")),
        ):
            if getattr(self, name) not in allowed:
                words = ", ".join(str(one) for one in allowed if one)
                raise UserError(f"{self.kind}: {name} = {getattr(self, name)!r} is none of {words}")
        for name, least in (("examples", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and (name, value) != ("examples", None):
                raise UserError(f"{self.kind}: {name} = {value!r} is not a whole number from {least} on")

    @property
    def most(self) -> int:
        """How many examples are drawn at most."""
        return EXAMPLES.get(self.kind, 256) if self.examples is None else self.examples


@dataclass(frozen=True)
class Inputs:
    """Arrays: images float [N, 3, H, W] as the model takes them, or uint8 [N, H, W, 3]; tokens [M, context]; labels [N], numbers of
    classes; head [C, d], embeddings of the classes; `logit_scale`, the log temperature to use with the head.
    """

    images: Any = None
    tokens: Any = None
    labels: Any = None
    head: Any = None
    logit_scale: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Inputs":
        """Arrays (numpy, torch, lists) by name. Raises UserError naming the key and what it must be."""
        unknown = [name for name in given if name not in NAMES]
        if unknown:
            raise UserError(
                f"inputs has no {unknown[0]!r}{_near(unknown[0], NAMES)}; it may have {', '.join(NAMES)}"
            )
        arrays = {name: _array(name, value) for name, value in given.items() if value is not None}
        scale = arrays.pop("logit_scale", None)
        found = cls(**arrays, logit_scale=None if scale is None else float(scale.reshape(-1)[0]))
        found._check()
        return found

    def _check(self) -> None:
        images, head = self.images, self.head
        if images is not None:
            plain = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
            floats = images.dtype.kind == "f" and images.ndim == 4 and images.shape[1] == 3
            if not (plain or floats):
                raise UserError(
                    f"inputs['images'] is {images.dtype} {list(images.shape)}; give floats [N, 3, H, W] as the model takes them, or "
                    "uint8 [N, H, W, 3]"
                )
            if images.dtype.kind == "f" and not np.isfinite(images).all():
                raise UserError("inputs['images'] holds NaN or infinity")
        if self.tokens is not None and (self.tokens.ndim != 2 or self.tokens.dtype.kind not in "iu"):
            raise UserError(
                f"inputs['tokens'] is {self.tokens.dtype} {list(self.tokens.shape)}; give integers [N, context]"
            )
        if head is not None and (head.ndim != 2 or head.dtype.kind != "f"):
            raise UserError(f"inputs['head'] is {head.dtype} {list(head.shape)}; give floats [classes, d]")
        if self.labels is not None and (self.labels.ndim != 1 or self.labels.dtype.kind not in "iu"):
            raise UserError(
                f"inputs['labels'] is {self.labels.dtype} {list(self.labels.shape)}; give whole numbers [N]"
            )
        if self.labels is not None and images is not None and len(self.labels) != len(images):
            raise UserError(
                f"inputs has {len(images)} images and {len(self.labels)} labels; give one for each"
            )

    def drawn(self, most: int, seed: int) -> "Inputs":
        """At most `most` images with their labels, and where there are no images of tokens, in their order."""
        if self.images is None:
            rows = chosen(len(self.tokens), most, seed) if self.tokens is not None else slice(None)
            return Inputs(
                None,
                None if self.tokens is None else self.tokens[rows],
                self.labels,
                self.head,
                self.logit_scale,
            )
        rows = chosen(len(self.images), most, seed)
        labels = None if self.labels is None else self.labels[rows]
        return Inputs(self.images[rows], self.tokens, labels, self.head, self.logit_scale)


def chosen(count: int, most: int, seed: int) -> Any:
    """The rows of a seeded draw, in ascending order; all of them where there are no more than `most`."""
    if count <= most:
        return slice(None)
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def _array(name: str, value: Any) -> np.ndarray:
    if type(value).__module__.split(".")[0] == "torch":
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) in ("torch.bfloat16", "torch.float16") else value).numpy()
    found = np.asarray(value)
    if found.dtype.kind not in "iuf":
        raise UserError(f"inputs[{name!r}] is {found.dtype}, not numbers")
    return found


def _near(word: str, among: Any) -> str:
    found = get_close_matches(str(word), [str(one) for one in among], n=1)
    return f"; did you mean {found[0]}?" if found else ""
