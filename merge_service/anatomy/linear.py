"""How a parameter acts on its input, read from its name and shape: as a matrix [outputs, inputs], row by row, or element by element.

Libraries store some weights with the input first, a convolution over patches as a kernel, and a token table as rows that a token
selects. Statistics of inputs (Gram matrices) are in the order of inputs, so a rule that uses these asks for the matrix here.

Invariant: `rows` and `flat` are inverse to each other and keep every element.
"""

import math
from dataclasses import dataclass
from typing import Any

Array = Any
_INPUT_FIRST = ("proj", "text_projection")
"""Parameters of open_clip that multiply from the right: y = x P."""
_TABLES = ("token_embedding", "embed_tokens", "word_embeddings", "wte")
_UNFOLDED = ("conv1", "patch_embedding", "patch_embed")


@dataclass(frozen=True)
class Linear:
    """A linear map of `inputs` to `outputs`. `first`: stored as [inputs, outputs]. `diagonal`: of an input only one element is not zero
    (a token), or every element has its own factor (the weight of a norm), so that its Gram matrix is a diagonal.
    """

    inputs: int
    outputs: int
    first: bool = False
    diagonal: bool = False

    def rows(self, flat: Array) -> Array:
        """The matrix [outputs, inputs] of a tensor, or of any array of its size."""
        if self.first:
            return flat.reshape(self.inputs, self.outputs).T
        return flat.reshape(self.outputs, self.inputs)

    def flat(self, matrix: Array) -> Array:
        """The tensor's elements in a row, of a matrix [outputs, inputs]."""
        return (matrix.T if self.first else matrix).reshape(-1)

    @property
    def is_scaling(self) -> bool:
        """Whether every element is multiplied on its own: the weight of a norm."""
        return self.diagonal and not self.first

    @property
    def gram_size(self) -> int:
        """Number of elements of the Gram matrix of the input."""
        return self.inputs if self.diagonal else self.inputs**2


def linear_of(name: str, shape: tuple[int, ...]) -> Linear | None:
    """The linear map that a parameter is, None for a shift, a scalar or a table of positions."""
    parts = name.split(".")
    last, layer = parts[-1], parts[-2] if len(parts) > 1 else ""
    if 0 in shape:
        return None
    if len(shape) == 1:
        norm = last == "weight" and (layer.startswith("ln_") or "norm" in layer)
        return Linear(shape[0], 1, diagonal=True) if norm else None
    if len(shape) == 4 and last == "weight" and any(word in parts for word in _UNFOLDED):
        return Linear(math.prod(shape[1:]), shape[0])
    if len(shape) != 2:
        return None
    if last == "weight" and layer in _TABLES:
        return Linear(shape[0], shape[1], first=True, diagonal=True)
    if last in _INPUT_FIRST:
        return Linear(shape[0], shape[1], first=True)
    return Linear(shape[1], shape[0]) if last in ("weight", "in_proj_weight") else None
