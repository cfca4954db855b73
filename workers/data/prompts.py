"""The training texts of a split's samples, as rows of a token table: every text is tokenised once, and batches gather rows.

Texts of an encoded split are read and tokenised on demand, so that no table grows with the split.
Invariant: a sample has the texts of `Samples.texts`, in that order.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import numpy as np
import torch

from merge_service.errors import UserError
from workers.data.decode import Samples

Tokenizer = Callable[[Sequence[str]], torch.Tensor]
KEPT = 50_000
"""The number of texts of an encoded split whose tokens are cached: 15 MB at 77 tokens."""
_TOKENISING = threading.Lock()
"""Two threads prepare batches, and tokenizers are not thread-safe."""


class Prompts:
    """The texts of a decoded split; sample i has the texts `names[first[i] : first[i] + count[i]]`.

    A text is tokenised when it is first picked, so a short training run on a large split tokenises few. `table` [texts, context] holds
    the tokens in the smallest sufficient integer type; it has no columns before the first pick.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        names: np.ndarray,
        first: np.ndarray,
        count: np.ndarray,
    ) -> None:
        self.table = np.empty((len(texts), 0), np.uint8)
        self._texts, self._tokenizer = texts, tokenizer
        self._names, self._first, self._count = names, first, count
        self._known = np.zeros(len(texts), bool)

    def pick(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Tokens, integers [n, context], of one text of each sample of `rows` [n], chosen by its draw in [0, 1)."""
        wanted = self._names[self._first[rows] + (draws * self._count[rows]).astype(np.int64)]
        if not self._known[wanted].all():
            with _TOKENISING:
                self._learn(np.unique(wanted[~self._known[wanted]]))
        return self.table[wanted]

    def _learn(self, new: np.ndarray) -> None:
        """Tokenise texts. Other threads read meanwhile, so a row is marked as known only after the table holds it."""
        if not len(new):
            return
        tokens = self._tokenizer([self._texts[text] for text in new]).numpy()
        kind = np.result_type(self.table.dtype, *map(np.min_scalar_type, (tokens.min(), tokens.max())))
        if not self.table.shape[1]:
            self.table = np.zeros((len(self._texts), tokens.shape[1]), kind)
        self.table = self.table.astype(kind, copy=False)
        self.table[new] = tokens
        self._known[new] = True


class Asked:
    """The prompts of an encoded split. The tokens of the `KEPT` most recently used texts are cached."""

    def __init__(self, samples: Samples, tokenizer: Tokenizer) -> None:
        self._samples, self._tokenizer = samples, tokenizer
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()

    def pick(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """As `Prompts.pick`. Raises UserError for a sample without a text, ShardError for an unreadable one."""
        texts = [self._text(row, draw) for row, draw in zip(rows.tolist(), draws.tolist(), strict=True)]
        with _TOKENISING:
            new = [text for text in dict.fromkeys(texts) if text not in self._known]
            if new:
                tokens = self._tokenizer(new).numpy().astype(np.int32)
                self._known.update(
                    zip(new, map(np.copy, tokens), strict=True)
                )  # a view would keep the whole array alive
            found = np.stack([self._known[text] for text in texts])
            for text in dict.fromkeys(texts):
                self._known.move_to_end(text)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return found

    def _text(self, row: int, draw: float) -> str:
        own = self._samples.texts(row)
        if not own:
            raise _nameless(self._samples, row)
        return own[int(draw * len(own))]


def prompts(samples: Samples, tokenizer: Tokenizer) -> Prompts | Asked:
    """The prompts of one split. Raises UserError for a sample without a text."""
    return _prompts(samples, tokenizer) if isinstance(samples.captions, list) else Asked(samples, tokenizer)


def _nameless(samples: Samples, row: int) -> UserError:
    return UserError(f"dataset {samples.name!r}: sample {row} has neither a caption nor a prompt")


@lru_cache(maxsize=256)
def _prompts(samples: Samples, tokenizer: Tokenizer) -> Prompts:
    """The texts of one split, once per process."""
    texts: dict[str, int] = {}
    known: dict[Hashable, tuple[int, int]] = {}
    names: list[int] = []
    spans = np.empty((2, len(samples)), np.int64)
    for row, (label, captions) in enumerate(zip(samples.labels.tolist(), samples.captions, strict=True)):
        what: Hashable = captions or label
        if what not in known:
            own = samples.texts(row)
            if not own:
                raise _nameless(samples, row)
            known[what] = (len(names), len(own))
            names += [texts.setdefault(text, len(texts)) for text in own]
        spans[:, row] = known[what]
    return Prompts(list(texts), tokenizer, np.array(names, np.int64), *spans)
