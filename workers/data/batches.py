"""Training batches: the samples, crops and texts of any step, for any rank.

A batch is computed from its step number alone, so a resumed run needs no earlier batch. Pixels stay uint8 and crops stay boxes here;
`workers.feed` turns both into model input on the device. Pictures of an encoded split are cropped and resized when they are read.
Invariant: `Batches.share(step)` depends on (data, recipe, seed, step, rank, world) only. The shares of all ranks in one step
make up one global batch, which does not depend on `world`.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from merge_service.errors import UserError
from workers.data.decode import Samples, height_and_width, load
from workers.data.encoded.pictures import Pictures
from workers.data.mixture import SOURCES, batch_counts, batch_indices, generator
from workers.data.prompts import Tokenizer, prompts
from workers.data.share import CROP_DRAWS, WHOLE, Share, copy_rows, crop_boxes, piece_boxes
from workers.jobs import Source, TrainJob


class Batches:
    """One rank's batches of a training job.

    `preprocess` is the model's open_clip preprocess_cfg; size, interpolation, resize_mode and fill_color are used here. `shape` is the
    shape of the pictures in a share, (b, H, W, 3). Raises UserError if `batch_size` is no multiple of the number of ranks, or if a
    source of the mixture has no samples.
    """

    def __init__(
        self,
        job: TrainJob,
        tokenizer: Tokenizer,
        preprocess: Mapping[str, Any],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.batch_size, self.seed = int(job.recipe["batch_size"]), job.seed
        self.mixture, self.crop = dict(job.recipe["mixture"]), dict(job.recipe["augment"])
        if self.batch_size % world:
            raise UserError(
                f"task {job.task!r}: batch_size {self.batch_size} is not a multiple of the number of workers, {world}; choose a multiple"
            )
        self._rank, self._world = rank, world
        height, width = height_and_width(preprocess["size"])
        self.shape = (self.batch_size // world, height, width, 3)
        given: dict[str, tuple[Source, ...]] = {
            "pretraining": job.pretraining,
            "update": job.update,
            "buffer": job.buffer,
        }
        self._parts: list[Samples] = []
        self._starts: dict[str, np.ndarray] = {}
        self._offsets: dict[str, int] = {}
        for name in SOURCES:
            sources = given[name] if self.mixture[name] > 0 else ()
            found = [load(source, preprocess["size"], job.cache, preprocess) for source in sources]
            self._offsets[name] = len(self._parts)
            self._starts[name] = np.cumsum([0, *map(len, found)])
            self._parts += found
        self.sizes = {name: int(starts[-1]) for name, starts in self._starts.items()}
        batch_counts(self.batch_size, self.mixture, self.sizes)
        self._prompts = [prompts(part, tokenizer) for part in self._parts]
        self._stored = [part.images if isinstance(part.images, Pictures) else None for part in self._parts]

    def share(self, step: int) -> Share:
        """This rank's share of the global batch of `step` (0-based)."""
        indices = batch_indices(step, self.seed, self.batch_size, self.mixture, self.sizes)
        draws = generator(self.seed, 1, step).random((self.batch_size, 1 + CROP_DRAWS))
        where: list[tuple[np.ndarray, np.ndarray]] = []
        start = 0
        for name, rows in indices.items():
            first = (self._rank - start) % self._world
            where.append(self._places(name, rows[first :: self._world]))
            start += len(rows)
        parts, rows = (np.concatenate(found) for found in zip(*where, strict=True))
        mine = draws[self._rank :: self._world]
        boxes, pieces = self._crops(parts, rows, mine[:, 1:])
        tokens, places = torch.unique(self._tokens(parts, rows, mine[:, 0]), dim=0, return_inverse=True)
        return Share(parts, rows, boxes.astype(np.float32), tokens.numpy(), places.numpy(), pieces)

    def read(self, share: Share, start: int, stop: int, out: np.ndarray) -> None:
        """Copy pictures start..stop of a share, uint8 [H, W, 3] each, into the rows of `out`."""
        parts, rows = share.parts[start:stop], share.rows[start:stop]
        starts = np.flatnonzero(np.diff(parts, prepend=-1)).tolist()  # of runs of one part
        for first, last in pairwise([*starts, len(parts)]):
            part = int(parts[first])
            stored = self._stored[part]
            if stored is None:
                copy_rows(self._parts[part].images, rows[first:last], out[first:last])
            else:
                for number in range(first, last):
                    stored.cut(int(rows[number]), share.pieces[start + number].tolist(), out[number])

    def _crops(self, parts: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`boxes` and `pieces` of a `Share`: each picture is cropped either on the device or from its original."""
        scale, ratio = self.crop["scale"], self.crop["ratio"]
        boxes = crop_boxes(draws, *self.shape[1:3], scale, ratio)
        pieces = np.zeros((len(rows), 4), np.int64)
        for number in np.unique(parts):
            stored, here = self._stored[number], parts == number
            if stored is not None:
                pieces[here] = piece_boxes(draws[here], stored.sizes(rows[here]), scale, ratio)
                boxes[here] = WHOLE
        return (boxes[:0] if pieces[:, 2].all() else boxes), pieces

    def _places(self, name: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each index of a source, and its row in that part."""
        parts = np.searchsorted(self._starts[name], indices, side="right") - 1
        return self._offsets[name] + parts, indices - self._starts[name][parts]

    def _tokens(self, parts: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> torch.Tensor:
        """int64 [b, context]: one text for each sample, chosen by a draw in [0, 1)."""
        found: np.ndarray | None = None
        for part in np.unique(parts):
            here = parts == part
            tokens = self._prompts[part].pick(rows[here], draws[here])
            if found is None:
                found = np.empty((len(parts), tokens.shape[1]), np.int64)
            found[here] = tokens
        assert found is not None
        return torch.from_numpy(found)
