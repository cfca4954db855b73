"""A study as a job on a remote cluster: what is sent, and how its state is read later.

Invariant: a shipment is this package's source, the study file, the files that it names by relative path, and the modules
that the user names. What a study names is below the current directory: no link leads out of it, or out of a folder that
the study names. A path that the nodes cannot open is refused. The study is fixed when it is sent, so the job reads
exactly the study that was checked here.
"""

import hashlib
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypedDict

from cluster.code import PACKAGES
from cluster.memory import MORE_MEMORY, is_about_memory
from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.run.status import Status
from pipeline.study.config import Study, load_study

CODE = Path(__file__).resolve().parents[2]
MAX_BYTES = 200 * 10**6
MAX_FILES = 2000
"""The limits of one shipment, because Ray keeps it in the memory of the head."""

PLACES = ("data.root", "data.cache", "storage.store")
"""Keys whose paths are never sent: they must exist on every node."""

KILLED = (-9, 137)
"""Exit codes of a process ended by SIGKILL, as Python and as a shell report them."""

FACE = "temporal_merge.py"
"""The module that a technique of one's own imports; it is sent with the packages."""

PYTHON = "python -m pipeline.cli"
_NOT_INSTALLED = ("No module named", "cannot import name", "SyntaxError")


class Submitted(TypedDict):
    """A study as a job; `exit_code` is that of the run, None while it has not ended."""

    job: str
    state: str
    attached: bool
    out: str
    exit_code: int | None


class JobState(TypedDict):
    """A job in the answer of `status`."""

    id: str
    state: str
    exit_code: int | None


class RemoteStatus(Status):
    """The status on a cluster, and the last job of OUT there, None if the cluster has none."""

    job: JobState | None


class Starting(TypedDict):
    """A run whose job has not begun yet: `state` is starting."""

    state: str
    job: JobState


@dataclass(frozen=True)
class Along:
    """What goes along with a study. `modules` are Python files with techniques of the user's own: the job gets a copy of each, and runs it
    as `--module` does. `options` are further ones of `run`."""

    modules: Sequence[Path] = ()
    options: Sequence[str] = ()


def submit_study(
    path: Path,
    overrides: Sequence[str],
    out: Path | None,
    url: str,
    *,
    along: Along = Along(),
    show: TextIO | None = None,
) -> Submitted:
    """Run a study on a cluster, or attach to its job if there is one.

    `show` gets the job's output to its end; without it the function returns at once. Raises UserError, ClusterError.
    """
    study = load_study(path, overrides)
    where = _shared_out(study, out)
    files = list(dict.fromkeys(relative_files(study)))
    modules = along.modules
    sent = [*modules, *(file for path in files for file in _contents(path))]
    from cluster.submission import Cluster, check_dashboard

    check_dashboard(url)
    cluster = Cluster(url)
    metadata = {"study": study.name, "out": str(where), "study_sha256": _digest(study, along)}
    text = _written_out(study, path, overrides)
    sets = [part for one in overrides for part in ("--set", one)] if text is None else []
    sets += [part for module in modules for part in ("--module", module.name)]
    sets += along.options
    command = f"{PYTHON} {shlex.join(['run', path.name, *sets, '--address', 'auto', '--out', str(where)])}"
    with shipment(path, files, text, modules) as room:
        job, attached = cluster.submit_or_attach(key_of(study.name, where), command, room, metadata)
    if attached and job.metadata.get("study_sha256") != metadata["study_sha256"]:
        raise UserError(
            f"{where} is being worked on by job {job.id} with another version of the study {study.name}; wait for it, end it with "
            f"`temporal-merge stop {where} --address {url}`, or choose another --out"
        )
    print(
        f"job {job.id} {'is already under way: attached' if attached else f'submitted with {_counted(sent)} of the study'}",
        file=sys.stderr,
        flush=True,
    )
    if show is not None:
        job = _watch(cluster, job.id, where, show)
    return {
        "job": job.id, "state": job.state, "attached": attached, "out": str(where),
        "exit_code": _exit_code(job) if job.ended else None,
    }  # fmt: skip


def remote_status(out: Path, url: str) -> RemoteStatus | Starting:
    """The answer of `status OUT` on the cluster.

    Raises UserError if OUT holds no run there and no job is about to create one.
    """
    from cluster.submission import Cluster

    cluster = Cluster(url)
    job = _job_of(cluster, out)
    name = f"status-{_short(str(out))}-{secrets.token_hex(4)}"
    command = f"{PYTHON} {shlex.join(['status', str(out), '--json'])}"
    with shipment() as room:
        asked, said = cluster.answer(name, command, room)
    told = None if job is None else JobState(id=job.id, state=job.state, exit_code=job.exit_code)
    if asked.exit_code == 0:
        answer: Status = json.JSONDecoder().raw_decode(said[said.index("\n{") + 1 :])[0]
        return {**answer, "job": told}
    if job is not None and told is not None and not job.ended:
        return {"state": "starting", "job": told}
    errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    raise UserError(f"on {url}: {errors[-1] if errors else asked.message or said[-500:]}")


def stop_study(out: Path, url: str) -> str:
    """End the job that works on OUT. Returns its id. Raises UserError if there is none."""
    from cluster.submission import Cluster

    cluster = Cluster(url)
    job = _job_of(cluster, out)
    if job is None or job.ended:
        raise UserError(
            f"no job of {url} works on {out}; `temporal-merge status {out} --address {url}` says what is there"
        )
    cluster.stop(job.id)
    return job.id


def key_of(name: str, out: Path) -> str:
    """The common prefix of the ids of all jobs of one study in one OUT."""
    return f"{name}-{_short(str(out))}"


@contextmanager
def shipment(
    study: Path | None = None,
    files: Sequence[Path] = (),
    text: str | None = None,
    modules: Sequence[Path] = (),
) -> Iterator[Path]:
    """A directory with this package's source, the study file (or `text` in its place), `files` under their relative paths, and
    `modules` beside the study, where every process of the job imports them from.

    Hidden files are left out.
    """
    with tempfile.TemporaryDirectory(prefix="temporal-merge-") as home:
        room = Path(home)
        for name in PACKAGES:
            shutil.copytree(
                CODE / name, room / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
            )
        shutil.copyfile(CODE / FACE, room / FACE)
        for module in modules:
            shutil.copyfile(module, room / module.name)
        for path in (file for named in files for file in _contents(named)):
            (room / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, room / path)
        if study is not None and text is not None:
            (room / study.name).write_text(text, encoding="utf-8")
        elif study is not None:
            shutil.copyfile(study, room / study.name)
        yield room


def _written_out(study: Study, path: Path, overrides: Sequence[str]) -> str | None:
    """The study with paths and overrides written out, if a variable or `~` could mean another path on the cluster; else None."""
    given = (path.read_text(encoding="utf-8"), *overrides)
    return study.resolved_yaml() if any("$" in text or "~" in text for text in given) else None


def relative_files(study: Study) -> Iterator[Path]:
    """The existing files and directories that a study names by relative path. Raises ConfigError.

    Paths of data and storage are never sent: they must be absolute, on storage that all nodes share, or URLs.
    """
    problems: list[str] = []
    sent: set[Path] = set()
    texts = dict(_texts(study.model_dump(mode="json"))) | {"data.root": study.data_root}
    for key, text in texts.items():
        path = Path(text.removeprefix("local-dir:"))
        if "://" in text or path.is_absolute():
            continue
        if key in PLACES:
            problems.append(
                f"{key}: {text} is a place on this machine; give {_SHARED}, for instance --set {key}=/shared/{path.name}"
            )
        elif ("/" in text or path.suffix) and path.exists():
            problems += [f"{key}: {problem}" for problem in _unfit(path)]
            sent |= set(_contents(path))
            if len(sent) > MAX_FILES or _bytes(sent) > MAX_BYTES:
                problems.append(
                    f"{key}: with {text} {_counted(sent)} would be sent along, which is too much (at most {MAX_FILES} files, "
                    f"{MAX_BYTES / 1e6:g} MB); give {_SHARED}"
                )
            yield path
    if problems:
        raise ConfigError([f"study {study.name}: {problem}" for problem in problems])


def _unfit(path: Path) -> Iterator[str]:
    """Why a path of the study cannot be sent."""
    if ".." in path.parts:
        yield f"{path} lies outside this directory; give a path below it, or {_SHARED}"
    elif not (home := path.resolve()).is_relative_to(Path.cwd().resolve()):
        yield f"{path} is a link to {home}, outside this directory; give a path below it, or {_SHARED}"
    elif path.parts[0] in PACKAGES:
        yield f"{path} lies in a directory with the name of a package of temporal-merge, which is sent as well; rename it"
    else:
        yield from (f"{part}: {problem}" for part in _contents(path) if (problem := _unfit_part(part, home)))


def _unfit_part(part: Path, home: Path) -> str:
    target = Path(os.path.realpath(part))  # Path.resolve raises if links form a circle
    if part.is_symlink() and not target.is_relative_to(home):
        return f"a link to {target}, outside of what the study names; put the file itself there, or give {_SHARED}"
    if part.is_dir():
        return f"a link to a directory, which is not sent; put the files themselves there, or give {_SHARED}"
    if not part.is_file():
        return "neither a file nor a directory; remove it"
    return "" if os.access(part, os.R_OK) else "cannot be read; correct its permissions"


def _contents(path: Path) -> list[Path]:
    """The files below a path that are sent; links to directories are listed as they are.

    Hidden files are not sent: some would make Ray leave out other files, and none belongs to a model.
    """
    if not path.is_dir():
        return [path]
    found = []
    for folder, below, names in os.walk(path, onerror=_unreadable):
        links = [name for name in below if (Path(folder) / name).is_symlink()]
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [Path(folder) / name for name in sorted(names + links) if not name.startswith(".")]
    return found


def _unreadable(error: OSError) -> None:
    raise ConfigError(
        f"{error.filename} cannot be read ({error.strerror}), so it cannot be sent; correct its permissions"
    )


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def _counted(files: Collection[Path]) -> str:
    return f"{len(files)} files ({_bytes(files) / 1e6:.1f} MB)"


_SHARED = "an absolute path on storage that all nodes of the cluster share"


def _shared_out(study: Study, out: Path | None) -> Path:
    if out is None or not out.is_absolute():
        given = f"--out {out} is" if out else "without --out it would be"
        raise UserError(
            f"{given} a place on one node only; give {_SHARED}, for instance --out /shared/runs/{study.name}"
        )
    return out


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of a tree with their key paths."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{key}[{index}]")


def _digest(study: Study, along: Along) -> str:
    """That of a study and of what it runs with: a job with another one is another study's."""
    digest = hashlib.sha256(study.model_dump_json().encode())
    for module in along.modules:
        digest.update(module.read_bytes())
    digest.update("\0".join(along.options).encode())
    return digest.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _job_of(cluster: Any, out: Path) -> Any:
    """The last job of OUT."""
    return next((job for job in reversed(cluster.jobs()) if job.metadata.get("out") == str(out)), None)


def _watch(cluster: Any, name: str, out: Path, stream: Any) -> Any:
    """Print the output of a job until it ends. If the client leaves earlier, print how to attach again."""

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        job = cluster.follow(name, write)
    except BaseException:
        print(
            f"\njob {name} goes on without this client; the same command attaches to it again, "
            f"`temporal-merge stop {out} --address {cluster.url}` ends it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        raise
    if _exit_code(job):
        print(f"job {name} {job.state}: {_why(job)}", file=sys.stderr, flush=True)
    return job


def _exit_code(job: Any) -> int:
    """The exit code of the run; 1 for a job that was stopped, killed, or never began."""
    if job.state == "succeeded":
        return 0
    return job.exit_code if job.exit_code and job.exit_code > 0 else 1


def _why(job: Any) -> str:
    if job.state == "stopped":
        return "it was stopped; submit again to go on"
    if job.exit_code in KILLED or is_about_memory(job.message):
        return f"its driver was killed on the head, as happens where memory runs out: {MORE_MEMORY}; submit again to go on"
    if job.exit_code == 127 or any(sign in job.message for sign in _NOT_INSTALLED):
        return (
            "its node cannot import what it needs: the `python` on the PATH of `ray start` must be 3.11 or newer and have "
            "temporal-merge's dependencies, on every node (only source is sent)"
        )
    if job.exit_code is None:
        return " ".join(job.message.split())[-500:]
    return f"exit code {job.exit_code}; its output is above, with paths of the cluster"
