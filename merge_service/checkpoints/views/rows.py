"""Weights seen over another vocabulary: the rows of embeddings and heads in another order, with rows that the model lacks.

Models that learnt new tokens have longer embeddings, and row i of two models may mean different tokens. Before a merge each model is
seen over one vocabulary: a row is the model's own, the mean of rows of other models, zero, or padding.

Invariant: all tensors with a vocabulary axis are seen over the same rows, and no other tensor is changed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from merge_service.checkpoints.dtypes import encode
from merge_service.checkpoints.header import TensorInfo
from merge_service.checkpoints.weights import Named, Weights
from merge_service.errors import IncompatibleCheckpoint

_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens\w*|wte|word_embeddings|shared|tok_embeddings|embed_in|token_embedding)\.weight$"
)
_HEAD = re.compile(
    r"(?:^|\.)(?:(?:lm_head(?:\.decoder)?|embed_out|proj_out|output|vocab_projector|predictions\.decoder|decoder\.output_projection)"
    r"\.(?:weight|bias)|(?:lm_head|predictions)\.bias|final_logits_bias)$"
)
_CHUNK = 1 << 12


@dataclass(frozen=True)
class Rows:
    """Where the rows of a model's embedding come from: `own` has the model's row for each row of the output, -1 for none.

    `given` says which rows of other models make up such a row, as their mean: pairs of path and row; none for zeros. A row in
    neither is padding: the mean of all that are no padding.
    """

    own: tuple[int, ...]
    given: Mapping[int, tuple[tuple[Path, int], ...]] = field(default_factory=dict)


def vocabulary_of(weights: Weights) -> tuple[int, list[str]]:
    """The number of rows of the input embedding, and the names of all tensors with a vocabulary axis, the embedding first.

    Raises `IncompatibleCheckpoint` if there is no embedding, or naming a head or an embedding of another size.
    """
    tensors = weights.tensors
    first = next((name for name in tensors if _EMBEDDING.search(name)), None)
    if first is None:
        raise IncompatibleCheckpoint(
            f"{weights.path} has no tensor that is a word embedding by its name, so its vocabulary cannot be changed"
        )
    size = tensors[first].shape[0]
    names = [
        first,
        *(name for name in tensors if name != first and (_EMBEDDING.search(name) or _HEAD.search(name))),
    ]
    wrong = next((name for name in names if _length(tensors[name]) != size), None)
    if wrong is not None:
        raise IncompatibleCheckpoint(
            f"{weights.path}: {wrong} has shape {list(tensors[wrong].shape)}, but {first} has {size} rows; a vocabulary is merged "
            "only if embeddings and heads have one row for each token: resize them (in transformers: resize_token_embeddings)"
        )
    return size, names


def _length(info: TensorInfo) -> int | None:
    """The size of the first axis that is not 1: that of the vocabulary."""
    return next((one for one in info.shape if one != 1), None)


class Reworded(Named):
    """`of` as `Weights` over the vocabulary of `rows`; `donors` are the models that rows are given from, by path."""

    def __init__(self, of: Weights, rows: Rows, donors: Mapping[Path, Weights]) -> None:
        self.of, self.files, self._rows, self._donors = of, of.files, rows, donors
        self._own = np.asarray(rows.own, np.int64)
        size, names = vocabulary_of(of)
        if self._own.size and self._own.max() >= size:
            raise IncompatibleCheckpoint(
                f"{of.path} has {size} rows of embeddings, but its tokenizer gives a token the id {self._own.max()}"
            )
        self._embedding, self._at = names[0], list[tuple[str, bool]]()
        self._padding: dict[str, np.ndarray] = {}
        places: dict[tuple[int, int, bool], int] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, info in of.tensors.items():
            key = (info.shard, info.offset, info.numel > 0)
            if key not in places or not info.numel:
                places[key] = len(self._at)
                self._at.append((name, name in names))
            shape = (
                tuple(len(rows.own) if one == size else one for one in info.shape)
                if name in names
                else info.shape
            )
            if name in names and info.shape.count(size) > 1:
                shape = (len(rows.own), *info.shape[1:])
            tensors[name] = replace(info, shape=shape, shard=0, offset=places[key])
        super().__init__(of.path, tensors, of.metadata)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`."""
        info = self.tensors[name]
        there, has_words = self._at[info.offset]
        if not has_words:
            return self.of.read(there, start, stop)
        width = info.numel // len(self._own)
        first, last, _ = slice(start, stop).indices(info.numel)
        begin, end = first // width, -(-max(first, last) // width)
        block = self._block(there, begin, end, width)
        padding = [row for row in range(begin, end) if self._own[row] < 0 and row not in self._rows.given]
        if padding:
            block[[row - begin for row in padding]] = self._mean(there, width)
        return block.reshape(-1)[first - begin * width : max(first, last) - begin * width]

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As of `Weights`; rows of a vocabulary are made in the tensor's dtype."""
        there, has_words = self._at[self.tensors[name].offset]
        if not has_words:
            return self.of.raw(there, start, stop)
        return encode(self.read(name, start, stop), self.tensors[name].kind)

    def address(self, name: str) -> int | None:
        """As of `Weights`."""
        there, has_words = self._at[self.tensors[name].offset]
        return None if has_words else self.of.address(there)

    def fingerprint(self) -> str:
        """That of the weights behind it."""
        return self.of.fingerprint()

    def digests(self) -> tuple[str, str]:
        """Those of the weights behind it."""
        return self.of.digests()

    def _block(self, there: str, begin: int, end: int, width: int) -> np.ndarray:
        """Rows begin..end, those of padding zero; runs of the model's own rows are read at once."""
        kind = self.of.tensors[there].kind
        block = np.zeros((end - begin, width), kind.compute or kind.storage)
        row = begin
        while row < end:
            own = int(self._own[row])
            if own < 0:
                given = self._rows.given.get(row, ())
                for path, theirs in given:
                    block[row - begin] += self._row_of(path, there, theirs, width)
                if len(given) > 1:
                    block[row - begin] /= len(given)
                row += 1
                continue
            run = 1
            while row + run < end and self._own[row + run] == own + run:
                run += 1
            part = self.of.read(there, own * width, (own + run) * width)
            block[row - begin : row - begin + run] = part.reshape(run, width)
            row += run
        return block

    def _row_of(self, path: Path, name: str, row: int, width: int) -> np.ndarray:
        donor = self._donors[path]
        if name not in donor.tensors and name.endswith(".weight"):
            name = vocabulary_of(donor)[1][0]  # a head that is tied to the embedding
        info = donor.tensors.get(name)
        if info is None or info.numel < (row + 1) * width or info.numel % width:
            shown = "no such tensor" if info is None else f"shape {list(info.shape)}"
            raise IncompatibleCheckpoint(
                f"{path} should give row {row} of {name} to {self.of.path}, but it has {shown}"
            )
        return donor.read(name, row * width, (row + 1) * width)

    def _mean(self, there: str, width: int) -> np.ndarray:
        """The mean of all rows that are no padding."""
        if there not in self._padding:
            total, count = np.zeros(width), 0
            words = [row for row in range(len(self._own)) if self._own[row] >= 0 or row in self._rows.given]
            for begin in range(0, len(self._own), _CHUNK):
                end = min(begin + _CHUNK, len(self._own))
                total += self._block(there, begin, end, width).sum(0, dtype=np.float64)
            count = len(words)
            self._padding[there] = total / max(count, 1)
        return self._padding[there]
