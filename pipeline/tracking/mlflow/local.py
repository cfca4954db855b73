"""The tracking store and artifacts on this machine, and the settings of MLflow in this process.

MLflow stores the absolute address of every artifact. When a store is opened, its addresses are set to the OUT that holds it, also
after OUT was moved or copied.

Invariant: a tracking store in OUT exists completely or not at all, and so does a file among MLflow's artifacts.
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
"""The columns of MLflow's tables that hold addresses of artifacts."""


def local_uri(out: Path) -> str:
    """The tracking URI of a study whose tracking store is in its own directory."""
    return f"sqlite:///{out.resolve() / LOCAL_DB}"


def make_local_store(out: Path) -> None:
    """Create the sqlite tracking store of `out`, completely or not at all: interrupted migrations cannot be resumed."""
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
    # A link never replaces a file: if two processes create the store at the same time, both use the first.
    with contextlib.suppress(FileExistsError):
        os.link(staged, target)
    staged.unlink()


def follow_home(out: Path, wait_seconds: float = 10.0) -> str | None:
    """Set the addresses in the tracking store of `out` to its own artifacts; returns the former place, None if nothing changed.

    All addresses or none are changed, and only those below a place that was this store's own. The caller must hold the flush
    lock. Raises TrackingError.
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
    """Former places of this store's artifacts, from the addresses of its first experiment and of ours."""
    found = []
    for number, location in db.execute("SELECT experiment_id, artifact_location FROM experiments"):
        place = str(location).removesuffix("/0") if number == 0 else str(location)
        if place.startswith("file:") and place.endswith(f"/{LOCAL_ARTIFACTS}") and place != home:
            found.append(place)
    return list(dict.fromkeys(found))


def _alive(pid: str) -> bool:
    return pid.split("-")[0].isdigit() and Path(f"/proc/{pid.split('-')[0]}").exists()


def guard_environment() -> None:
    """Settings of the MLflow client that delivery depends on; they apply to this process."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow  # noqa: F401  importing it enables logging at INFO, which would write into the progress display

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store").setLevel(
        logging.CRITICAL
    )  # it also logs a traceback of every error it raises


def place(source: Path, target: Path) -> None:
    """Put a file into a local artifact directory atomically: a link if the file system allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    staged.unlink(missing_ok=True)
    try:
        os.link(source, staged)
    except OSError:
        shutil.copyfile(source, staged)
    staged.replace(target)
