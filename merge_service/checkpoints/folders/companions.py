"""The files beside the weights of a directory that a library opens: configuration, tokenizer, preprocessors, code.

Files come in sets, such as the files of a tokenizer. A set is copied whole from the first input that has one of its files, the
base first. Weights, states of optimizers and everything else that is not listed here is left behind.

Invariant: files are copied as bytes and never imported, and none is read from outside its model's directory.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_service.checkpoints.folders.kinds import (
    CONFIG,
    OPEN_CLIP,
    OPEN_CLIP_CONFIG,
    read_json,
    weights_name,
)
from merge_service.errors import CheckpointError

_TOKENIZER = re.compile(
    r"(?:.*tokenizer.*|special_tokens_map|added_tokens|vocab|normalizer)\.json|(?:vocab|merges)\.txt|.*\.(?:spm|tiktoken|bpe|codes)"
    r"|(?:.*tokenizer|spiece|sentencepiece.*)\.model|chat_template\.(?:jinja|json)|tokenization_.*\.py|additional_chat_templates/.*"
)
_PROCESSORS = re.compile(
    r"(?:.*preprocessor_config|processor_config|image_processor)\.json|(?:image_processing|processing|feature_extraction)_.*\.py"
)
_GENERATION = re.compile(r"generation_config\.json|custom_generate/.*")
_SENTENCES = re.compile(r"(?:modules|config_sentence_transformers|sentence_.*_config)\.json")
_MODEL = re.compile(r"config\.json|.*\.py|(?:LICENSE|NOTICE|USE_POLICY).*")
SETS = (_TOKENIZER, _PROCESSORS, _GENERATION, _SENTENCES, _MODEL)
"""A file belongs to the first set that its name fits."""
_INNER = ("additional_chat_templates", "custom_generate")
_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf)")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Folder:
    """A directory to write: the name of its weights without suffix, the files beside them by relative name with where they come
    from, and values to set in its configuration by key path. `texts` are files that are written as given. `notes` are for the
    user.
    """

    name: str
    files: Mapping[str, Path]
    changes: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, sources: Sequence[Path], tokenizer: Path | None = None) -> "Folder | None":
        """What goes with a merge of these inputs, the base first; None if no input has a configuration beside it. The files of a
        tokenizer come from the model `tokenizer` if it is given and has some.
        """
        directories = list(dict.fromkeys(one if one.is_dir() else one.parent for one in sources))
        given = [one for one in sources if one.is_dir() and (one / OPEN_CLIP_CONFIG).is_file()]
        if given:
            return cls(OPEN_CLIP, {OPEN_CLIP_CONFIG: given[0] / OPEN_CLIP_CONFIG})
        first = next((one for one in directories if (one / CONFIG).is_file()), None)
        if first is None:
            return None
        _config(first / CONFIG)
        name, files, notes = weights_name(first), dict[str, Path](), list[str]()
        assert name is not None
        preferred = [] if tokenizer is None else [tokenizer if tokenizer.is_dir() else tokenizer.parent]
        for wanted in SETS:
            for directory in [*preferred, *directories] if wanted is _TOKENIZER else directories:
                held = {part: path for part, path in _listed(directory) if _set_of(part) is wanted}
                if held:
                    files |= held
                    break
        for part, path in list(files.items()) if "modules.json" in files else ():
            if part == "modules.json":
                files |= _modules(path, notes)
        return cls(name, {part: _inside(path, part) for part, path in files.items()}, notes=tuple(notes))

    @property
    def is_open_clip(self) -> bool:
        """Whether it is open_clip's, which has nothing but its configuration."""
        return self.name == OPEN_CLIP

    def written(self, *, texts: Mapping[str, str], changes: Mapping[str, Any]) -> "Folder":
        """With these files and changes too."""
        return replace(self, texts={**self.texts, **texts}, changes={**self.changes, **changes})

    def taken_apart(self, output: str, source: str) -> "Folder":
        """With a configuration that no longer ties the output layer to the embedding, and a note of it."""
        said = f"{output} and {source} were one tensor and are two in the result: config.json says tie_word_embeddings: false"
        changes = {**self.changes, "tie_word_embeddings": False}
        return replace(self, changes=changes, notes=(*self.notes, said))

    def write(self, out: Path, dtype: str | None) -> None:
        """Write the files into `out`; the configuration says that most floats are of this dtype."""
        for part, path in self.files.items():
            target = out / part
            if path.resolve() == target.resolve():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if part == CONFIG:
                _configure(path, target, dtype, self.changes)
            else:
                shutil.copyfile(path, target)
        for part, text in self.texts.items():
            (out / part).write_text(text, encoding="utf-8")


def _listed(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(directory.iterdir()):
        if path.is_file():
            yield path.name, path
        elif path.is_dir() and path.name in _INNER:
            yield from (
                (f"{path.name}/{inner.name}", inner) for inner in sorted(path.iterdir()) if inner.is_file()
            )


def _set_of(part: str) -> re.Pattern[str] | None:
    return None if _WEIGHTS.fullmatch(part) else next((one for one in SETS if one.fullmatch(part)), None)


def _modules(path: Path, notes: list[str]) -> dict[str, Path]:
    """The files of the modules that sentence-transformers lists: pooling and dense layers in directories of their own."""
    try:
        listed = json.loads(path.read_bytes())
        names = [str(one.get("path") or "") for one in listed]
    except (ValueError, AttributeError, TypeError, OSError):
        raise CheckpointError(f"{path} is not a list of modules; correct it, or remove it") from None
    found = {}
    for name in names:
        directory = path.parent / name
        if not name or Path(name).name != name or not directory.is_dir():
            continue
        for file in sorted(one for one in directory.iterdir() if one.is_file()):
            found[f"{name}/{file.name}"] = file
            if _WEIGHTS.fullmatch(file.name):
                notes.append(f"{directory / file.name} holds weights of its own: they are copied, not merged")
    return found


def _inside(path: Path, part: str) -> Path:
    """`path`, unless it is a link out of its model's directory (or of that model's part of the Hugging Face cache)."""
    root = path.parents[part.count("/")].resolve()
    cache = root.parent.parent if root.parent.name == "snapshots" else root
    if not path.resolve().is_relative_to(cache):
        raise CheckpointError(
            f"{path} is a link to a file outside its directory, which is not copied into a model; put the file itself there"
        )
    return path


def _configure(source: Path, target: Path, dtype: str | None, changes: Mapping[str, Any]) -> None:
    """Copy a configuration; only what is to change is changed."""
    config = _config(source)
    before = json.dumps(config)
    if dtype in _DTYPES and "_class_name" not in config:
        _say_dtype(config, _DTYPES[dtype])
    for key, value in changes.items():
        *parts, last = key.split(".")
        inner = config
        for one in parts:
            inner = inner[one]
        inner[last] = value
    if json.dumps(config) == before:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if found is None:
        raise CheckpointError(
            f"{path} is not a JSON object; correct it, or name a .safetensors file for --out"
        )
    return found


def _say_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the dtype where a configuration has one, also for its parts; `dtype` is the newer name of `torch_dtype`."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    for key in keys:
        config[key] = dtype
    for value in config.values():
        if isinstance(value, dict) and {"dtype", "torch_dtype"} & value.keys():
            _say_dtype(value, dtype)
