"""Description and verification of datasets on disk: classes, prompts, splits, shards and their digests.

The layout is that of CLIP benchmark: `ROOT/NAME/{classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt,
SPLIT/nshards.txt, SPLIT/0.tar, ...}`, where NAME may carry the prefix `wds_`. Roots written by this project add `manifest.json`
(sha256, size and sample count per shard). Any other root is scanned once; its index is kept in the cache, so the user's
directory stays unchanged.
Invariant: digests depend on the content of shards, class names and prompts only, never on paths or times.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from merge_service.errors import UserError
from workers.data.cache import Access, cache_root, file_sha256, recall, remember
from workers.data.contents import REVISION, Survey, check_label, inspect, together
from workers.data.encoded.addresses import plain
from workers.data.lines import class_names, filled_lines, stated_number
from workers.data.tarscan import ShardError
from workers.data.zero_shot import GROUPS, misfit

MANIFEST_FILE = "manifest.json"
SUITE_FILE = "suite.json"
KIND_FILE, CLASSES_FILE = "dataset_type.txt", "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
DESCRIPTION_FILES = (MANIFEST_FILE, KIND_FILE, CLASSES_FILE, TEMPLATES_FILE)
ROLES = ("pretraining", "adaptation", "held_out")
FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class ShardInfo:
    """One shard. `file` is relative to the folder of the split; `bytes` is the size of the file."""

    file: str
    sha256: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class SplitInfo:
    """One split. `digest` is the sha256 over (sha256, samples) of the shards in order, wherever they are.

    `address` is the folder of the shards at a server, ending in `/`; "" if they are in the folder of the split.
    """

    samples: int
    shards: tuple[ShardInfo, ...]
    digest: str
    address: str = ""


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset. `kind` is "classification" or "retrieval"; `templates` hold `{c}` in place of the class name."""

    name: str
    kind: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    splits: dict[str, SplitInfo]
    digest: str


def folder(root: str | Path, dataset: str) -> Path:
    """The folder of a dataset under `root`: NAME or wds_NAME (a `/` in NAME is a `-` on disk). Raises UserError if there is none."""
    if not is_name(dataset):
        raise UserError(f"{dataset!r} is not a valid dataset name: use letters, digits, '.', '_', '-'")
    on_disk = dataset.replace("/", "-")
    for candidate in (Path(root) / on_disk, Path(root) / f"wds_{on_disk}"):
        if candidate.is_dir():
            return candidate
    if not Path(root).is_dir():
        raise UserError(
            f"data root {root} does not exist; `python -m workers.data.mini --root DIR` writes the mini suite"
        )
    there = sorted(path.name.removeprefix("wds_") for path in Path(root).iterdir() if path.is_dir())
    raise UserError(f"no dataset {dataset!r} under {root}; there are: {', '.join(there[:40]) or 'none'}")


def read_suite(root: str | Path) -> dict[str, Any]:
    """`suite.json` of a root: {"name", "roles": {"pretraining"|"adaptation"|"held_out": [dataset, ...]}, ...}, and optionally
    "zero_shot_groups": {"replayed"|"never_replayed": [dataset, ...]}.

    Raises UserError if the file or a role is missing, or if a held-out set is not in exactly one group.
    """
    path = Path(root) / SUITE_FILE
    if not path.is_file():
        raise UserError(
            f"{root} holds no {SUITE_FILE}: name the datasets of each role (data.pretraining, data.adaptation, data.held_out), "
            "or write the mini suite with `python -m workers.data.mini --root DIR`"
        )
    suite = _json(path)
    roles = suite.get("roles")
    if not isinstance(roles, dict) or set(roles) != set(ROLES):
        raise UserError(f"{path}: `roles` must hold exactly {', '.join(ROLES)}")
    _check_names(path, "roles", roles)
    groups = suite.get("zero_shot_groups")
    if groups is not None:
        if not isinstance(groups, dict) or set(groups) != set(GROUPS):
            raise UserError(f"{path}: `zero_shot_groups` must hold exactly {' and '.join(GROUPS)}")
        _check_names(path, "zero_shot_groups", groups)
        if wrong := misfit(groups, roles["held_out"], roles["pretraining"]):
            raise UserError(f"{path}: `zero_shot_groups`: {wrong}")
    return suite


def _check_names(path: Path, key: str, lists: Mapping[str, Any]) -> None:
    for what, names in lists.items():
        if (
            not isinstance(names, list)
            or not all(is_name(name) for name in names)
            or len(set(names)) < len(names)
        ):
            raise UserError(f"{path}: `{key}.{what}` must list names of datasets, each once")


def describe(root: str | Path, dataset: str, cache: str | Path | None = None) -> DatasetInfo:
    """Classes, prompts, splits and digests of one dataset.

    With a `manifest.json`, no shard is read, and the result is cached in the process until a description file changes. Without one,
    all shards are scanned and hashed on first use; the index is kept under `cache` (default: $TEMPORAL_MERGE_CACHE, else
    ~/.cache/temporal-merge) and is valid for shards of unchanged size and modification time.
    Raises UserError (no such dataset, no class names) and ShardError (a damaged or forbidden shard of a root without manifest).
    """
    home = folder(root, dataset)
    if not (home / MANIFEST_FILE).is_file():
        return _described(home, dataset, cache)
    stamps = [_stamp(home / name) for name in DESCRIPTION_FILES]
    known = _DESCRIBED.get((home, dataset))
    if known is None or known[0] != stamps:
        known = _DESCRIBED[home, dataset] = (stamps, _described(home, dataset, cache))
    return known[1]


_DESCRIBED: dict[tuple[Path, str], tuple[list[Any], DatasetInfo]] = {}


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _described(home: Path, dataset: str, cache: str | Path | None) -> DatasetInfo:
    kind = _kind(home)
    classes = class_names(home / CLASSES_FILE)
    if kind == "classification" and not classes:
        raise UserError(
            f"{home / CLASSES_FILE} is missing or empty: a classification set needs one class name per line (for a retrieval set, "
            f"{KIND_FILE} must hold the word retrieval)"
        )
    templates = filled_lines(home / TEMPLATES_FILE) or (("a photo of a {c}.",) if classes else ())
    for template in templates:
        if "{c}" not in template:
            raise UserError(
                f"{home}: the prompt template {template!r} lacks {{c}}, the place of the class name"
            )
    splits = _own_splits(home) if (home / MANIFEST_FILE).is_file() else _indexed_splits(home, kind, cache)
    digest = _digest([kind, classes, templates, {name: split.digest for name, split in splits.items()}])
    return DatasetInfo(dataset, kind, classes, templates, splits, digest)


def verify(
    root: str | Path, dataset: str, split: str, cache: str | Path | None = None, decode: bool = False
) -> Survey:
    """Check every shard of a split against its stated size, sha256 and sample count, and validate its samples (`contents`).

    Returns the survey of the split. With `cache`, a shard that passed before is not read again while its size and modification
    time are unchanged. With `decode`, every shard is read and every picture decoded.
    Raises ShardError naming the shard: missing, cut, flipped, short, forbidden, duplicate, pixels or unreadable.
    """
    home, info = folder(root, dataset), describe(root, dataset, cache)
    surveys = []
    if address := split_of(info, split).address:
        raise UserError(
            f"the {split} split of {dataset} has its shards at {address}; only a train split that is read as it is stored "
            "(data.reading: encoded) may; copy the shards"
        )
    for shard in split_of(info, split).shards:
        path = home / split / shard.file
        surveys.append(verify_shard(path, shard, info.kind, Path(cache) if cache else None, decode))
        if surveys[-1].labels:
            check_label(surveys[-1].labels[-1][0], len(info.classes), path, surveys[-1].top)
    return together(surveys)


def unread_bytes(root: str | Path, dataset: str, splits: Collection[str], cache: str | Path) -> int:
    """The bytes of the shards in these splits that have not been surveyed yet; 0 if all have."""
    home = folder(root, dataset)
    if not (home / MANIFEST_FILE).is_file():
        known = _index_file(home, cache_root(cache)).exists()
        return 0 if known else sum(path.stat().st_size for path in home.glob("*/*.tar"))
    info, unread = describe(root, dataset, cache), 0
    for name in info.splits.keys() & set(splits):
        for shard in info.splits[name].shards:
            path = home / name / shard.file
            kept = (
                _kept_survey(path, shard.sha256, shard.samples, info.kind, Path(cache))
                if path.is_file()
                else None
            )
            unread += 0 if kept is None or kept.exists() else shard.bytes
    return unread


def split_of(info: DatasetInfo, split: str) -> SplitInfo:
    """One split of a dataset. Raises UserError naming the existing splits."""
    if split not in info.splits:
        raise UserError(
            f"dataset {info.name!r} has no split {split!r}; it has: {', '.join(info.splits) or 'none'}"
        )
    return info.splits[split]


def verify_shard(
    path: Path, stated: ShardInfo, kind: str, cache: Path | None = None, decode: bool = False
) -> Survey:
    """Check one shard against its manifest entry; see `verify`. Raises ShardError."""
    if not path.is_file():
        raise ShardError(path, "missing", "no such file, or not a regular file")
    kept = _kept_survey(path, stated.sha256, stated.samples, kind, cache)
    if kept is not None and not decode and (found := _surveyed(recall(kept))) is not None:
        return found
    check_bytes(path, stated)
    survey = inspect(path, kind, decode)
    if survey.samples != stated.samples:
        raise ShardError(
            path, "short", f"the shard holds {survey.samples} samples, the manifest states {stated.samples}"
        )
    _keep_survey(kept, survey, path)
    return survey


def check_bytes(path: Path, stated: ShardInfo) -> None:
    """Raise ShardError (missing, cut, flipped) if the bytes of a shard differ from those that its manifest states."""
    if not path.is_file():
        raise ShardError(path, "missing", "no such file, or not a regular file")
    size = path.stat().st_size
    if size < stated.bytes:
        raise ShardError(path, "cut", f"the file has {size} of {stated.bytes} bytes")
    if size > stated.bytes or file_sha256(path) != stated.sha256:
        raise ShardError(
            path,
            "flipped",
            f"its bytes differ from those the manifest states (sha256 {stated.sha256[:12]}...)",
        )


def _kept_survey(path: Path, sha256: str, samples: int, kind: str, cache: Path | None) -> Path | None:
    """The cache file of a shard's survey, named after the shard's content, path, size and time, and the rules of the survey."""
    if cache is None:
        return None
    status = path.stat()
    facts = [REVISION, str(path.resolve()), status.st_size, status.st_mtime_ns, sha256, samples, kind]
    return cache / "verified" / f"{_digest(facts)[:32]}.json"


def _keep_survey(kept: Path | None, survey: Survey, shard: Path) -> None:
    if kept is not None:
        split, home, root = shard.parents[:3]
        remember(kept, json.dumps(asdict(survey)), Access.of(root, home, split, shard))


def _surveyed(text: str | None) -> Survey | None:
    """A cached survey; None if its text is missing or damaged."""
    try:
        body = json.loads(text or "")
        pairs = {name: tuple((key, count) for key, count in body[name]) for name in ("labels", "pictures")}
        return Survey(**{**body, **pairs, "files": tuple(body["files"])})
    except (ValueError, TypeError, KeyError):
        return None


def split_info(shards: list[ShardInfo]) -> SplitInfo:
    """The split that consists of these shards, in order."""
    digest = _digest([[shard.sha256, shard.samples] for shard in shards])
    return SplitInfo(sum(shard.samples for shard in shards), tuple(shards), digest)


def write_manifest(home: Path, splits: Mapping[str, list[ShardInfo]]) -> None:
    """Write `manifest.json` into the dataset folder `home`; equal shards give equal bytes."""
    body = {name: [asdict(shard) for shard in shards] for name, shards in splits.items()}
    text = json.dumps({"format": FORMAT, "splits": body}, indent=1, sort_keys=True)
    (home / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def is_name(name: Any) -> bool:
    """Whether a value is a valid dataset name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and ".." not in name


def _kind(home: Path) -> str:
    stated = filled_lines(home / KIND_FILE)
    kind = stated[0] if stated else "classification"
    if kind not in ("classification", "retrieval"):
        raise UserError(
            f"{home / KIND_FILE}: {kind!r} is not supported; it must be classification or retrieval"
        )
    return kind


def _own_splits(home: Path) -> dict[str, SplitInfo]:
    manifest = _json(home / MANIFEST_FILE)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{home / MANIFEST_FILE}: format {manifest.get('format')!r}; this version reads {FORMAT}"
        )
    splits = {}
    try:
        addresses = {name: plain(str(one)) for name, one in manifest.get("addresses", {}).items()}
        for name, stated in sorted(manifest["splits"].items()):
            shards = [ShardInfo(**shard) for shard in stated]
            _check_types(shards)
            splits[name] = replace(split_info(shards), address=addresses.get(name, ""))
    except ValueError as error:
        raise UserError(f"{home / MANIFEST_FILE}: addresses: {error}") from None
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{home / MANIFEST_FILE} is malformed ({error}); write the dataset again") from None
    for split in splits.values():
        for shard in split.shards:
            if Path(shard.file).name != shard.file or shard.file.startswith("."):
                raise UserError(f"{home / MANIFEST_FILE}: shard {shard.file!r} is not a plain file name")
    return splits


def _check_types(shards: list[ShardInfo]) -> None:
    for shard in shards:
        numbers = all(type(n) is int and n >= 0 for n in (shard.samples, shard.bytes))
        if not numbers or not isinstance(shard.file, str) or not isinstance(shard.sha256, str):
            raise TypeError(
                f"{str(shard)[:200]}: file and sha256 must be text, samples and bytes must be counts"
            )


def _indexed_splits(home: Path, kind: str, cache: str | Path | None) -> dict[str, SplitInfo]:
    """Splits of a root without manifest; shards of unchanged size and time are taken from the cached index."""
    root = cache_root(cache)
    index_file = _index_file(home, root)
    known: dict[str, Any] = {}
    with suppress(ValueError, RecursionError):  # an unreadable index is computed again
        known = dict(json.loads(recall(index_file) or "{}"))
    index: dict[str, list[Any]] = {}
    splits = {}
    for place in sorted(path for path in home.iterdir() if path.is_dir() and any(path.glob("*.tar"))):
        shards = []
        for path in _shard_files(place):
            if not path.is_file():
                raise ShardError(path, "missing", "not a regular file")
            status, key = path.stat(), f"{place.name}/{path.name}"
            facts = [kind, status.st_size, status.st_mtime_ns]
            match known.get(key):
                case [*stated, str(sha256), int(samples)] if stated == facts:
                    pass
                case _:
                    survey, sha256 = inspect(path, kind), file_sha256(path)
                    samples = survey.samples
                    _keep_survey(_kept_survey(path, sha256, samples, kind, root), survey, path)
            index[key] = [*facts, sha256, samples]
            shards.append(ShardInfo(path.name, sha256, samples, status.st_size))
        splits[place.name] = split_info(shards)
    if not splits:
        raise UserError(f"{home} holds no split: expected folders such as {home / 'test'} with *.tar shards")
    if index != known:
        remember(index_file, json.dumps(index, indent=1, sort_keys=True), Access.of(home.parent, home))
    return splits


def _index_file(home: Path, root: Path) -> Path:
    return root / "index" / f"{home.name}-{_digest(str(home.resolve()))[:16]}.json"


def _shard_files(place: Path) -> list[Path]:
    """Shards in numeric order. Raises ShardError if nshards.txt states another number."""
    files = sorted(
        place.glob("*.tar"), key=lambda path: (not path.stem.isdigit(), path.stem.zfill(12), path.name)
    )
    stated = stated_number(place / "nshards.txt")
    if stated not in (None, len(files)):
        raise ShardError(
            place, "missing", f"nshards.txt states {stated} shards, the folder holds {len(files)}"
        )
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
