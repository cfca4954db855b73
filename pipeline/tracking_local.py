"""The parts of tracking that touch this machine: its environment, its files, and what may be said about them.

Invariant: a tracking store of ours is there whole or not at all, and a file appears among MLflow's artifacts whole or not
at all.
"""

import contextlib
import logging
import os
import shutil
from pathlib import Path

LOCAL_DB = "mlflow.db"
LOCAL_ARTIFACTS = "mlartifacts"
_TIMEOUT_SECONDS = "10"


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
    store = SqlAlchemyStore(f"sqlite:///{staged.resolve()}", (out / LOCAL_ARTIFACTS).resolve().as_uri())
    store._dispose_engine()
    # Linked, not moved over it: should two processes make one at a time, both go on with the first.
    with contextlib.suppress(FileExistsError):
        os.link(staged, target)
    staged.unlink()


def _alive(pid: str) -> bool:
    return pid.split("-")[0].isdigit() and Path(f"/proc/{pid.split('-')[0]}").exists()


def guard_environment() -> None:
    """Settings of the MLflow client that our promises rest on; they apply to this process."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _TIMEOUT_SECONDS)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow  # noqa: F401  its import sets up logging at INFO, which would write into the progress display

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
