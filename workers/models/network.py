"""Networks and tokenizers built by open_clip, from configurations that were read by allow-list.

Invariant: nothing that comes with a model is executed or unpickled: no classes of a repository, no pickled weights.
"""

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_configs import arch_dict
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

from merge_service.checkpoints import CONFIG_FILE
from workers.models.configuration import LOCAL, ModelError, is_tokenizer_file, read_configuration


def tokenizer(directory: Path) -> "Remembering":
    """open_clip's tokenizer of a weights directory, as a function of texts to tokens, int64 [N, context].

    Building one takes a large part of a second, so it is cached per process, with its results, and shared by all models that use
    the same tokenizer.
    """
    return _tokenizer_of(read_configuration(directory / CONFIG_FILE)["model_cfg"], directory)


def _tokenizer_of(model_cfg: Mapping[str, Any], directory: Path | None) -> "Remembering":
    text_cfg = model_cfg["text_cfg"]
    name = text_cfg.get("hf_tokenizer_name")
    if name and directory is not None and any(map(is_tokenizer_file, directory.iterdir())):
        name = str(directory)  # files beside the weights need no network
    wanted = (text_cfg.get(key) for key in ("context_length", "tokenizer_mode", "tokenizer_kwargs"))
    return _tokenizer(name, json.dumps([*wanted], sort_keys=True))


@lru_cache(maxsize=8)
def _tokenizer(hugging_face: str | None, settings: str) -> "Remembering":
    context_length, mode, more = json.loads(settings)
    length = context_length or DEFAULT_CONTEXT_LENGTH
    if hugging_face is None:
        return Remembering(open_clip.SimpleTokenizer(context_length=length, **(more or {})))
    local = Path(hugging_face).is_dir()
    try:
        found = HFTokenizer(
            hugging_face, context_length=length, tokenizer_mode=mode, trust_remote_code=False,
            local_files_only=local, **(more or {}),
        )  # fmt: skip
    except Exception as error:  # transformers and the libraries below it raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the tokenizer {hugging_face} is not available: {type(error).__name__}: {reason} (code that comes with a tokenizer is "
            "never run)"
        ) from error
    return Remembering(found)


class Remembering:
    """A tokenizer that computes every text once, because class names and captions recur in every step and evaluation.

    Threads may share it. Its memory is bounded, also that of open_clip's own tokenizer, which remembers every word it ever saw.
    """

    MOST = 200_000  # texts, and words

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self._known: dict[str, torch.Tensor] = {}
        self._special = dict(getattr(plain, "cache", {}))
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        with self._lock:
            new = [text for text in dict.fromkeys(texts) if text not in self._known]
            if len(self._known) + len(new) > self.MOST:
                self._known, new = {}, list(dict.fromkeys(texts))
            if len(getattr(self.plain, "cache", ())) > self.MOST:
                self.plain.cache = dict(self._special)
            if new:
                self._known.update(zip(new, self.plain(new), strict=True))
            return torch.stack([self._known[text] for text in texts])


def build(
    configuration: Mapping[str, Any],
    room: Path,
    where: str,
    device: str = "cpu",
    *,
    only_tokens: bool = False,
) -> Any:
    """The network of a configuration with random weights; `room` is a directory of the caller for its files.

    Raises ModelError, which calls the configuration `where`.
    """
    (room / CONFIG_FILE).write_text(json.dumps(configuration), encoding="utf-8")
    return create(room.resolve(), where, device, only_tokens=only_tokens)


def save_tokenizer(model_cfg: Mapping[str, Any], home: Path | None, out: Path) -> None:
    """Save a Hugging Face tokenizer with the weights in `out`, the only place where open_clip looks for it.

    It comes from the directory `home` of the weights, if that has one.
    """
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):
        _tokenizer_of(model_cfg, home).plain.tokenizer.save_pretrained(str(out))


def create(directory: Path, where: str, device: str = "cpu", *, only_tokens: bool = False) -> Any:
    """open_clip's network for the configuration in a directory, read by allow-list."""
    found = read_configuration(directory / CONFIG_FILE, only_tokens=only_tokens)
    _refuse_code_of_text_tower(found, where)
    try:
        with quiet():  # open_clip warns about random weights; here they are intended, or overwritten next
            return open_clip.create_model(
                LOCAL + str(directory), load_weights=False, pretrained_text=False, device=device
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{where}: open_clip cannot build this model: {type(error).__name__}: {reason}"
        ) from error


def _refuse_code_of_text_tower(found: Mapping[str, Any], where: str) -> None:
    """A text tower of transformers uses its own classes, never code that comes with a model. Raises ModelError."""
    name = found["model_cfg"]["text_cfg"].get("hf_model_name")
    if not name:
        return
    try:
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{where}: the configuration of model_cfg.text_cfg.hf_model_name {name!r} is not available: {type(error).__name__}: "
            f"{reason} (code that comes with a model is never run)"
        ) from error
    attention = getattr(kind, "_attn_implementation", None)
    if kind.model_type not in arch_dict or attention not in (None, "eager", "sdpa"):
        raise ModelError(
            f"{where}: model_cfg.text_cfg.hf_model_name {name!r} is a {kind.model_type} with attention {attention or 'eager'}; "
            f"open_clip has text towers of {', '.join(arch_dict)}, with attention eager or sdpa"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip's log messages off the root logger, and keep open_clip from installing a handler on it."""
    root, silent = logging.getLogger(), logging.NullHandler()
    level = root.manager.disable
    root.addHandler(silent)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        root.removeHandler(silent)
