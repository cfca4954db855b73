"""Every exception class of ours survives pickling, and the way from a Ray worker to its driver."""

import ast
import builtins
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.pool import Pool
from cluster.portable import portable
from cluster.session import connect
from merge_service.errors import UserError
from tests.house import ROOT, modules
from tests.world import Cluster

MADE_WITH = {
    "ShardError": (Path("root/train/0.tar"), "cut", "the file ends early", "Fetch it again."),
    "ConfigError": (["recipe.lr: is missing", "name: is missing"],),
    "NondeterminismError": ("two results differ", "/one", "/two"),
    "PictureRefused": ("picture.unreadable", "it is cut"),
    "ServiceError": ("arrival.unknown", 404, "there is no such arrival"),
    "StorageFull": ("no room", 100, 7),
    "WeightsRefused": ("weights.missing", "it is gone"),
}
"""Arguments of classes with an `__init__` of their own; all others are made with a message."""


def _exceptions() -> Iterator[tuple[str, str]]:
    """(module, name) of every exception class, found in the sources so that nothing heavy need be imported."""
    known = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)}  # fmt: skip
    found: dict[str, str] = {}
    defined = [
        (".".join(path.with_suffix("").parts), node)
        for path in modules()
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    while True:
        more = {
            node.name: module
            for module, node in defined
            if {ast.unparse(base).split(".")[-1] for base in node.bases} & (known | found.keys())
        }
        if more.keys() <= found.keys():
            return iter(sorted((module, name) for name, module in found.items()))
        found |= more


EXCEPTIONS = list(_exceptions())


def _made(module: str, name: str) -> Exception:
    kind = getattr(importlib.import_module(module), name)
    return kind(*MADE_WITH.get(name, (f"the message of {name}",)))  # type: ignore[no-any-return]


def test_walk_finds_the_classes_that_it_should() -> None:
    names = {name for _, name in EXCEPTIONS}
    assert {"UserError", "ShardError", "ConfigError", "StepFailed", "Superseded", "OutOfMemory"} <= names


@pytest.mark.parametrize(("module", "name"), EXCEPTIONS, ids=[name for _, name in EXCEPTIONS])
def test_exception_survives_pickle_with_its_message_and_fields(module: str, name: str) -> None:
    error = _made(module, name)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
    assert portable(error) is error


class Raiser:
    """A worker that raises a given error."""

    def ours(self, module: str, name: str) -> None:
        raise _made(module, name)

    def foreign(self) -> None:
        raise Unpicklable(Path("0.tar"), 7)


class Unpicklable(UserError):
    """An error of a usual form that pickle cannot restore."""

    def __init__(self, path: Path, line: int) -> None:
        super().__init__(f"{path}, line {line} is wrong")


def test_error_that_pickle_cannot_make_again_keeps_its_message_and_the_nearest_class_that_can() -> None:
    sent = portable(Unpicklable(Path("0.tar"), 7))
    assert type(sent) is UserError and str(sent) == "Unpicklable: 0.tar, line 7 is wrong"
    assert str(pickle.loads(pickle.dumps(sent))) == str(sent)


@pytest.mark.ray
def test_every_exception_arrives_from_a_worker_with_its_class_and_message(cluster: Cluster) -> None:
    with connect(cluster.address):
        pool = Pool("raiser", Raiser, lambda actor, _: actor.remote())
        member = pool.open().members[0]
        for module, name in EXCEPTIONS:
            with pytest.raises(ray.exceptions.RayTaskError) as caught:
                ray.get(member.metered.remote("ours", module, name))
            assert str(caught.value.cause) == str(_made(module, name)), name
            assert type(caught.value.cause).__name__ == name
        with pytest.raises(UserError, match=r"0\.tar, line 7 is wrong"):
            pool.call("foreign", group=pool.groups[0]).result()
