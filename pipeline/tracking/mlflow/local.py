"""The parts of tracking that touch this machine: its environment, its files, and what may be said about them.

Invariant: a tracking store of ours is there whole or not at all, and so is a file among MLflow's artifacts. MLflow keeps
the absolute address of every artifact; in a store that is opened they name the OUT in which it lies, also after OUT was moved
or copied.
"""

import contextlib
import logging
import os
import shutil
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import TrackingError

LOCAL_DB = "mlflow.db"
LOCAL_ARTIFACTS = "mlartifacts"
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow's tables hold the places of artifacts."""


def local_uri(out: Path) -> str:
    """The tracking URI of a study that keeps its tracking store in its own directory."""
    return f"sqlite:///{out.resolve() / LOCAL_DB}"


def make_local_store(out: Path) -> None:
    """Create the sqlite tracking store of `out`, whole or not at all: migrations cut off half-way cannot be resumed."""
    target = out / LOCAL_DB
    if target.exists():
        return
    guard_environment()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(f".{LOCAL_DB}.*"):
        if not _alive(stale.name.split(".")[3]):
            stale.unlink(missing_ok=True)
    staged = out / f".{LOCAL_DB}.{os.getpid()}"
    store = SqlAlchemyStore(f"sqlite:///{staged.resolve()}", (out.resolve() / LOCAL_ARTIFACTS).as_uri())
    store._dispose_engine()
    # Linked, not moved over it: should two processes make one at a time, both go on with the first.
    with contextlib.suppress(FileExistsError):
        os.link(staged, target)
    staged.unlink()


def follow_home(out: Path, wait_seconds: float = 10.0) -> str | None:
    """Let the addresses in the tracking store of `out` name its own artifacts: the place that they named before, None if this one.

    All of them or none, and only those below a place that was this store's own. To be called by the holder of the flush lock.
    Raises TrackingError.
    """
    if not (out / LOCAL_DB).exists():
        return None
    home = (out.resolve() / LOCAL_ARTIFACTS).as_uri()
    try:
        with contextlib.closing(
            sqlite3.connect(out / LOCAL_DB, timeout=wait_seconds, isolation_level=None)
        ) as db:
            former = _former_homes(db, home)
            if not former:
                return None
            db.execute("BEGIN IMMEDIATE")
            for old in former:
                for table, column in _ADDRESSES:
                    db.execute(
                        f"UPDATE {table} SET {column} = ?1 || substr({column}, length(?2) + 1)"
                        f" WHERE {column} = ?2 OR substr({column}, 1, length(?2) + 1) = ?2 || '/'",
                        (home, old),
                    )
            db.execute("COMMIT")
    except sqlite3.Error as error:
        raise TrackingError(f"the addresses in {out / LOCAL_DB} cannot be read or set: {error}") from error
    return str(Path(unquote(urlsplit(former[0]).path)).parent)


def _former_homes(db: sqlite3.Connection, home: str) -> list[str]:
    """Other places at which this store's artifacts were: its first experiment and ours were made there."""
    found = []
    for number, location in db.execute("SELECT experiment_id, artifact_location FROM experiments"):
        place = str(location).removesuffix("/0") if number == 0 else str(location)
        if place.startswith("file:") and place.endswith(f"/{LOCAL_ARTIFACTS}") and place != home:
            found.append(place)
    return list(dict.fromkeys(found))


def _alive(pid: str) -> bool:
    return pid.split("-")[0].isdigit() and Path(f"/proc/{pid.split('-')[0]}").exists()


def guard_environment() -> None:
    """Settings of the MLflow client that our promises rest on; they apply to this process."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow  # noqa: F401  its import sets up logging at INFO, which would write into the progress display

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store").setLevel(
        logging.CRITICAL
    )  # it logs a traceback of what it raises as well


def place(source: Path, target: Path) -> None:
    """Put a file into a local artifact directory atomically: a link where the file system allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    staged.unlink(missing_ok=True)
    try:
        os.link(source, staged)
    except OSError:
        shutil.copyfile(source, staged)
    staged.replace(target)
