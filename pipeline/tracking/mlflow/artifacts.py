"""Files for MLflow: written into its artifact directories on this machine, or uploaded.

Weights are linked, not copied, if MLflow's artifacts are on the store's own file system (the default), so logging every
checkpoint costs no disk. Files that all models have in common are linked too.

Invariant: a file comes from OUT or the study's store, has a plain name, and goes below OUT or to the tracking server itself; no
answer of a server makes this process write anywhere else.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from pipeline.errors import CorruptArtifact, StoreError, TrackingError
from pipeline.files.disk import write_whole
from pipeline.study.addresses import redact
from pipeline.tracking.mlflow.flavor import MLMODEL, mlmodel, needs_hugging_face, shared_files
from pipeline.tracking.mlflow.local import LOCAL_ARTIFACTS, place
from pipeline.workspace.opening import store_of

MANIFEST = "manifest.json"
SHARED = "shared"
"""Folder of the files that all models have in common, among MLflow's artifacts in OUT."""
_REMOTE_SCHEMES = frozenset(
    {"s3", "gs", "abfs", "abfss", "wasb", "wasbs", "hdfs", "viewfs", "dbfs", "oss", "r2", "b2"}
)


class Refused(TrackingError):
    """The tracker rejects this row for good; later rows may still be accepted."""


class Artifacts:
    """The artifacts of one study, for the tracking store at `uri` (None: in OUT). `out` is absolute."""

    def __init__(self, out: Path, uri: str | None) -> None:
        self._out, self._uri = out, uri
        self._shared: dict[int, dict[str, Path]] = {}
        self._sent: set[tuple[str, str]] = set()

    def put(self, source: Path, location: str, upload: Callable[[], None]) -> None:
        """Put a file among the artifacts at `location`, by `upload` if they are not on this machine."""
        target = self.target(location)
        if target is None:
            upload()
        else:
            place(source, target / source.name)

    def put_model(self, client: Any, where: Mapping[str, str], body: Mapping[str, Any]) -> list[str]:
        """Put the files of a model row; returns the names of files that are no longer in the store.

        Without weights, what is put is a model all the same, whose loader says where the weights are.

        `where` is {"model_id", "run_id", "artifact_path"}; the last is the place of its artifacts.
        """
        target = self.target(where["artifact_path"])
        directory = self._directory(body)
        sources = {safe_name(name): directory / name for name in body["files"]}
        there = {name: source for name, source in sources.items() if source.is_file()}
        texts = {MANIFEST: json.dumps(body["manifest"], indent=2, sort_keys=True) + "\n"}
        is_whole = {WEIGHTS_FILE, CONFIG_FILE} <= there.keys()
        common = shared_files(is_whole and needs_hugging_face(directory))
        texts[MLMODEL] = mlmodel(where, body["manifest"], time.time_ns() // 1_000_000, is_whole)
        if target is not None:
            _fill(target, texts, there | self._kept(common))
        else:
            with tempfile.TemporaryDirectory(prefix="temporal-merge-") as scratch:
                _fill(Path(scratch), common | texts, {})
                self._upload(client, where["model_id"], [*there.values(), *Path(scratch).iterdir()])
        return [name for name, source in sources.items() if not source.is_file()]

    def _upload(self, client: Any, model_id: str, paths: Iterable[Path]) -> None:
        """Send the files and folders of a model, each in its own request: at a server that fails sometimes, one request for all
        might never succeed.

        A file that has arrived is not sent again by this process.
        """
        for path in sorted(paths, key=lambda path: (path.name == MLMODEL, path.name)):
            if (model_id, path.name) in self._sent:
                continue
            if path.is_dir():
                with tempfile.TemporaryDirectory(prefix="temporal-merge-") as alone:
                    path.rename(Path(alone) / path.name)
                    client.log_model_artifacts(model_id, alone)
            else:
                client.log_model_artifact(model_id, str(path))
            self._sent.add((model_id, path.name))

    def _kept(self, texts: Mapping[str, str]) -> dict[str, Path]:
        """Files that models have in common, written once; every model links to them."""
        if id(texts) not in self._shared:
            digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]
            room = self._out / LOCAL_ARTIFACTS / SHARED / digest
            for name, text in texts.items():
                (room / name).parent.mkdir(parents=True, exist_ok=True)
                if not (room / name).is_file():
                    write_whole(room / name, text)
            self._shared[id(texts)] = {name: room / name for name in texts}
        return self._shared[id(texts)]

    def target(self, location: str) -> Path | None:
        """The local directory of these artifacts, or None if they are to be uploaded.

        Raises TrackingError if a server names a path on this machine, or another host.
        """
        parts = urlsplit(location)
        server = urlsplit(self._uri or "")
        if parts.scheme in ("", "file"):
            path = Path(unquote(parts.path) if parts.scheme else location)
            if server.scheme in ("http", "https"):
                raise TrackingError(
                    f"the tracking server wants artifacts written to the local path {_shown(location)}, which is"
                    " refused; start it with --serve-artifacts or with an object store as --artifacts-destination"
                )
            home = self._out / LOCAL_ARTIFACTS
            if self._uri is None and not path.resolve().is_relative_to(home):
                raise TrackingError(f"{path} is not inside {home}, where this study keeps its artifacts")
            return path
        same_host = not parts.netloc or parts.netloc == server.netloc
        if parts.scheme in _REMOTE_SCHEMES or (
            parts.scheme in ("mlflow-artifacts", "http", "https") and same_host
        ):
            return None
        raise TrackingError(f"the tracking server sends artifacts to {_shown(location)}, which is refused")

    def inside(self, relative: str) -> Path:
        """A path in OUT. Raises Refused if it leads out of OUT."""
        path = (self._out / relative).resolve()
        if not path.is_relative_to(self._out):
            raise Refused(f"{relative!r} lies outside the study's directory")
        return path

    def _directory(self, body: Mapping[str, Any]) -> Path:
        """The directory of a row's files: in OUT, or opened by fingerprint in a store elsewhere."""
        if not body["files"] or body["store"].startswith("store/"):
            return self.inside(body["store"])
        store = store_of(self._out)
        try:
            record = store.find(body["manifest"]["fingerprint"])
            return self._out / "gone" if record is None else store.open_verified(record)
        except CorruptArtifact:
            return self._out / "gone"
        except StoreError as error:
            raise TrackingError(str(error)) from error


def _fill(target: Path, texts: Mapping[str, str], sources: Mapping[str, Path]) -> None:
    """Write texts and links into an artifact directory. MLmodel comes last, because it marks the model as complete."""
    for name, source in sources.items():
        place(source, target / name)
    for name, text in texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(target / name, text)


def safe_name(name: str) -> str:
    """`name`, if it is a plain file name. Raises Refused for a name that could leave its directory."""
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or name.startswith("."):
        raise Refused(f"{name!r} is no artifact name: letters, digits, dot, dash and underscore only")
    return name


def _shown(location: str) -> str:
    """One line of at most 300 characters, without credentials."""
    return redact(" ".join(location[:4000].split()))[:300]
