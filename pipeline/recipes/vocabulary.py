"""The vocabulary of a merge's output, and which rows of embeddings each model contributes to it.

The output has the tokenizer of the base, of another model, or the base's with the tokens that only other models have (`union`). Each
model is then seen over that vocabulary, as in mergekit 0.1.5: a token that a model lacks is filled in before the merge with the row of
its only owner, else the base's, else the mean of its owners; with zeros if no model has it. So a token that one expert added has no
task vector and keeps its owner's embedding.

Invariant: equal tokens get equal rows; no row is taken from a token of another text unless the recipe says so.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_service.checkpoints import Rows, open_weights, parts_of, vocabulary_of
from merge_service.errors import UserError
from pipeline.recipes.model import Merge, TokenSource, Vocabulary
from pipeline.recipes.tokenizers import (
    CONFIG,
    FILE,
    TEMPLATE,
    Tokenizer,
    extended,
    folder_of,
    template_of,
    tokenizer_of,
    with_template,
)

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
        "decoder_start_token_id")  # fmt: skip


@dataclass(frozen=True)
class Worded:
    """What a recipe's tokenizer and chat template come to: rows of each model by its path (none if all vocabularies are alike), files
    beside the weights by name, the model whose tokenizer files are copied, changes of the configuration, and notes.
    """

    rows: Mapping[Path, Rows] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def worded(merge: Merge) -> Worded:
    """Raises UserError for tokenizers that cannot be read or extended, and for tokens that a model is said to have and lacks."""
    models = [Path(path) for path in merge.models]
    found = Worded() if merge.tokenizer is None else _Words(models, merge.vocabulary).worded()
    if found.tokenizer is not None:
        found = replace(found, tokenizer=folder_of(found.tokenizer, FILE, "vocab.json"))
    if merge.chat_template is None:
        return found
    source = found.tokenizer or models[0]
    texts = with_template(
        folder_of(source, TEMPLATE, CONFIG), found.texts, _template(merge.chat_template, models)
    )
    return Worded(found.rows, texts, found.tokenizer, found.changes, found.notes)


def _template(wanted: str, models: Sequence[Path]) -> str:
    """The chat template of a recipe: its text, or the most common one of the models."""
    if wanted != "auto":
        return wanted
    known = [one for one in map(template_of, models) if one is not None]
    if not known:
        raise UserError(
            f"chat_template: auto: none of {', '.join(str(one) for one in models)} has a chat template"
        )
    return Counter(known).most_common(1)[0][0]


class _Words:
    """The vocabularies of the models of one merge, the base first."""

    def __init__(self, models: Sequence[Path], asked: Vocabulary) -> None:
        self.models, self.asked, self.notes = models, asked, list[str]()
        self.sizes = {model: _size(model) for model in models}
        held = {model: tokenizer_of(model) for model in models}
        base = held[models[0]]
        named = None if asked.source in ("base", "union") else Path(asked.source)
        self.is_bare = all(one is None for one in held.values())
        self.held: dict[Path, Tokenizer] = {}
        for model, one in held.items():
            if one is None and base is not None and self.sizes[model] == self.sizes[models[0]]:
                self.notes.append(f"{model} has no tokenizer; it is taken to have that of {models[0]}")
            elif one is None and not self.is_bare:
                raise UserError(
                    f"tokenizer: {model} has no tokenizer.json, so the meaning of its {self.sizes[model]} rows is unknown; put it there"
                )
            if one is not None or base is not None:
                self.held[model] = one or base  # type: ignore[assignment]
        if named is not None and tokenizer_of(named) is None:
            raise UserError(
                f"tokenizer: {named} has no tokenizer.json; give base, union, or the path of a model that has one"
            )
        self.source = models[0] if named is None else named

    def worded(self) -> Worded:
        """The rows of every model, and what goes with them."""
        if self.is_bare:
            if len(set(self.sizes.values())) == 1 and self.asked.source == "base" and not self.asked.tokens:
                return Worded()
            raise UserError(
                f"tokenizer: {self.models[0]} has no tokenizer.json, nor has any other model; vocabularies cannot be compared"
            )
        start = self.held.get(self.source) or tokenizer_of(self.source)
        assert start is not None
        new = self._new(start)
        ids = {
            **start.ids,
            **{token: max(start.ids.values(), default=-1) + 1 + at for at, (token, _) in enumerate(new)},
        }
        texts = extended(start, new)
        if self._is_alike(ids):
            if self.source == self.models[0] and not texts:
                return Worded(notes=tuple(self.notes))
            return Worded(texts=texts, tokenizer=self.source, notes=tuple(self.notes))
        size = max(ids.values()) + 1
        every = self.asked.pad_to_multiple_of or 1
        rows = -(-size // every) * every
        changes = self._changes(start, rows)
        return Worded(self._rows(ids, rows), texts, self.source, changes, tuple(self.notes))

    def _new(self, start: Tokenizer) -> list[tuple[str, Mapping[str, Any]]]:
        """The tokens to add to the tokenizer that the output begins with: those of other models, and those that the recipe names."""
        found: dict[str, Mapping[str, Any]] = {}
        if self.asked.source == "union":
            for added in (False, True):
                for model, held in self.held.items():
                    for token, at in held.ids.items():
                        if (
                            token not in start.ids
                            and at < self.sizes[model]
                            and (token in held.added) is added
                        ):
                            found.setdefault(token, held.added.get(token, {}))
        for token in self.asked.tokens:
            if token not in start.ids:
                found.setdefault(token, {})
        return list(found.items())

    def _is_alike(self, ids: Mapping[str, int]) -> bool:
        """Whether every model has just these rows, so that nothing is to be done."""
        sizes = set(self.sizes.values())
        return (
            len(sizes) == 1
            and not self.asked.tokens
            and self.asked.pad_to_multiple_of is None
            and all(held.ids == ids for held in self.held.values())
        )

    def _rows(self, ids: Mapping[str, int], count: int) -> dict[Path, Rows]:
        own = {model: [-1] * count for model in self.models}
        given: dict[Path, dict[int, tuple[tuple[Path, int], ...]]] = {model: {} for model in self.models}
        lonely = []
        for token, row in ids.items():
            owners = {
                model: at
                for model in self.models
                if (at := self.held[model].ids.get(token, -1)) in range(self.sizes[model])
            }
            asked = self.asked.tokens.get(token)
            filled = self._filled(token, asked, owners)
            if not owners and asked is None:
                lonely.append(token)
            for model in self.models:
                if model in owners and not (asked is not None and asked.force):
                    own[model][row] = owners[model]
                else:
                    given[model][row] = filled
        if lonely:
            self.notes.append(
                f"{len(lonely)} tokens that no model has a row for get zeros: {', '.join(lonely[:5])}"
            )
        return {model: Rows(tuple(own[model]), given[model]) for model in self.models}

    def _filled(
        self, token: str, asked: TokenSource | None, owners: Mapping[Path, int]
    ) -> tuple[tuple[Path, int], ...]:
        """The rows whose mean stands for a token where a model lacks it."""
        if asked is not None and asked.source is not None:
            if not isinstance(asked.source, str):
                return self._of_token(
                    token, asked.source.kind, asked.source.model, (asked.source.token, asked.source.token_id)
                )
            return self._of_token(token, "model_token", asked.source, (token, None))
        if len(owners) <= 1:
            return tuple(owners.items())
        base = self.models[0]
        return ((base, owners[base]),) if base in owners else tuple(owners.items())

    def _of_token(
        self, token: str, kind: str, model: str | None, which: tuple[str | None, int | None]
    ) -> tuple[tuple[Path, int], ...]:
        if kind == "zero" or model is None:
            return ()
        path, (text, number) = Path(model), which
        if path not in self.sizes:
            raise UserError(
                f"tokenizer.tokens.{token}: {model} is no model of this merge; there are {', '.join(map(str, self.models))}"
            )
        row = number if number is not None else self.held[path].ids.get(str(text), -1)
        if row not in range(self.sizes[path]):
            what = f"the token {text!r}" if number is None else f"a row {number}"
            raise UserError(f"tokenizer.tokens.{token}: {model} does not have {what}")
        return ((path, row),)

    def _changes(self, start: Tokenizer, rows: int) -> dict[str, Any]:
        """What the configuration of the base says differently over the new vocabulary: its size, and the ids of special tokens."""
        base = self.models[0]
        path = (base if base.is_dir() else base.parent) / "config.json"
        if not path.is_file():
            return {}
        config = json.loads(path.read_bytes())
        changes: dict[str, Any] = {}
        for prefix, part in (
            ("", config),
            *((f"{key}.", one) for key, one in config.items() if isinstance(one, dict)),
        ):
            if part.get("vocab_size") in (self.sizes[base], max(self.held[base].ids.values()) + 1):
                changes[f"{prefix}vocab_size"] = rows
            for key in _IDS:
                moved = self._moved(part.get(key), start)
                if moved is not None and moved != part.get(key):
                    changes[f"{prefix}{key}"] = moved
        if not any(key.endswith("vocab_size") for key in changes):
            raise UserError(
                f"{path} does not say under vocab_size that there are {self.sizes[base]} rows; correct it"
            )
        return changes

    def _moved(self, number: Any, start: Tokenizer) -> Any:
        """The id, in the output, of the token that the base has under this id (or list of ids)."""
        if isinstance(number, list):
            return [self._moved(one, start) for one in number]
        if start.folder == self.held[self.models[0]].folder or not isinstance(number, int):
            return number
        token = next((token for token, at in self.held[self.models[0]].ids.items() if at == number), None)
        return number if token is None else start.ids.get(token, number)


def _size(model: Path) -> int:
    with open_weights(parts_of(model)[0]) as held:
        return vocabulary_of(held)[0]
