"""Users' own techniques: registered, checked, executed and identified like the built-in ones."""

import dataclasses
import hashlib
import json
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_service import techniques
from merge_service.errors import TechniqueError
from merge_service.merge import advance, fold, merge
from merge_service.techniques import (
    Election,
    Origin,
    Param,
    Rule,
    TensorRule,
    TopMagnitudes,
    get,
    names,
    own,
    registry,
)
from merge_service.techniques.families.sums import Sum
from merge_service.techniques.params import COUNT_FROZEN, DENSITY, GRANULARITY
from tests.merge_service.toys import Files, load, made


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Remove what a test declares."""
    monkeypatch.setattr(registry, "_declared", {})
    techniques.forget_table()
    yield
    monkeypatch.undo()
    registry._installed.cache_clear()
    techniques.forget_table()


def declare(name: str = "mine", **options: Any) -> Any:
    @own.technique(name, formula="scale · mean", params=(Param("most", "float", 9.0, "limit", 0),), **options)
    def rule(xp: Any, params: dict[str, Any], blocks: list[Any]) -> Any:
        return sum(xp.clip(x, -params["most"], params["most"]) for x in blocks) / len(blocks)

    return rule


def test_own_technique_is_listed_and_validated_as_ours_are() -> None:
    declare()
    assert names()[-1] == "mine" and get("mine").needs == {"base"}
    assert get("mine").resolve({}, "merge") == {"most": 9.0, "scale": 1.0, "logit_scale": "merge"}
    with pytest.raises(TechniqueError, match="did you mean most"):
        get("mine").resolve({"mosst": 1}, "merge")
    with pytest.raises(TechniqueError, match="no stream form"):
        get("mine").require("stream")


def test_own_technique_computes_what_it_says_and_keeps_the_rules(tmp_path: Path) -> None:
    declare()
    files = Files(tmp_path)
    merge("mine", {"most": 0.25, "scale": 2.0}, files.start, files.paths, files.out)
    out = load(files.out)
    for name, base in files.base.items():
        if base.dtype.kind != "f":
            assert np.array_equal(out[name], base), name
        elif not name.endswith("logit_scale"):
            taus = [np.clip(expert[name] - base, -0.25, 0.25) for expert in files.experts]
            assert np.allclose(out[name], base + 2 * sum(taus) / len(taus), atol=1e-6), name
    origin = get("mine").origin
    assert origin is not None and made(files.out)["source"] == origin.source
    merge("average", {}, files.start, files.paths, files.out)
    assert "source" not in made(files.out)


def test_own_technique_gives_the_same_bytes_for_any_block_and_thread(tmp_path: Path) -> None:
    declare()
    files = Files(tmp_path)
    found = set()
    for block, threads in ((1, 1), (1 << 20, 2)):
        merge("mine", {}, files.start, files.paths, files.out, block=block, threads=threads)
        found.add(files.out.read_bytes())
    assert len(found) == 1


def test_own_technique_over_weights_folds_two_models_without_a_base(tmp_path: Path) -> None:
    declare(space="weights", arity=2)
    files = Files(tmp_path)
    one, other = files.paths[:2]
    fold("mine", {"most": 1e9}, None, one, other, files.out)
    name = "text_projection"
    mean = (files.experts[0][name] + files.experts[1][name]) / 2
    assert np.allclose(load(files.out)[name], mean, atol=1e-6)


@pytest.mark.parametrize("wrong", [lambda xp, params, blocks: blocks[0][:1], lambda xp, params, blocks: 3.0])
def test_rule_that_returns_anything_else_is_refused_by_name(wrong: Any, tmp_path: Path) -> None:
    own.technique("wrong", formula="?")(wrong)
    files = Files(tmp_path)
    with pytest.raises(TechniqueError, match=r"wrong gave .* one array of the blocks' shape"):
        merge("wrong", {}, files.start, files.paths, files.out)
    assert not files.out.exists()


def test_rule_that_gives_numbers_that_are_not_finite_writes_nothing(tmp_path: Path) -> None:
    own.technique("endless", formula="?")(lambda xp, params, blocks: blocks[0] + float("inf"))
    files = Files(tmp_path)
    with pytest.raises(ValueError, match=r"inf|finite"):
        merge("endless", {}, files.start, files.paths, files.out)
    assert not files.out.exists()


class Strongest(Rule):
    """Per element the task vector of largest magnitude, as in magmax; written as a user would."""

    floats = ("held",)

    def add(self, xp: Any, state: dict[str, Any], x: Any, place: Any) -> None:
        state["held"] = xp.where(xp.abs(x) >= xp.abs(state["held"]), x, state["held"])

    def result(self, xp: Any, state: dict[str, Any], majority: int) -> tuple[Any, Election]:
        return state["held"], Election()


class Halved(TensorRule):
    """Half the sum of task vectors, tensor by tensor."""

    def result(self, tensor: Any, state: dict[str, Any], count: int) -> Any:
        return state["sum"] / 2


def test_own_rule_streams_to_the_bytes_of_its_merge_and_of_ours(tmp_path: Path) -> None:
    own.technique("strongest", formula="max")(Strongest)
    files, state = Files(tmp_path), None
    ids = [f"t{number}" for number in range(len(files.paths))]
    for number, (name, path) in enumerate(zip(ids, files.paths)):
        after = tmp_path / f"state-{number}.safetensors"
        advance(
            "strongest", {}, files.start, path, tmp_path / "stream.safetensors", expert_id=name, state_in=state,
            state_out=after,
        )  # fmt: skip
        state = after
    for device in (None, "cpu"):
        merge("strongest", {}, files.start, files.paths, files.out, ids=ids, device=device)
        assert files.out.read_bytes() == (tmp_path / "stream.safetensors").read_bytes()
    merge("magmax", {}, files.start, files.paths, tmp_path / "ours.safetensors", ids=ids)
    assert values(files.out) == values(tmp_path / "ours.safetensors")


def test_state_of_an_own_rule_is_continued_only_by_the_same_source(tmp_path: Path) -> None:
    made = own.technique("strongest", formula="max")(Strongest)
    files, states = Files(tmp_path), [tmp_path / f"state-{number}.safetensors" for number in range(2)]

    def arrive(number: int) -> None:
        state = states[number - 1] if number else None
        advance(
            "strongest", {}, files.start, files.paths[number], None, expert_id=f"t{number}", state_in=state,
            state_out=states[number],
        )  # fmt: skip

    arrive(0)
    registry._declared["strongest"] = dataclasses.replace(made, origin=Origin("elsewhere", "0" * 64))
    techniques.forget_table()
    with pytest.raises(TechniqueError, match="was started with another source"):
        arrive(1)


def values(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load(path).items()}


def test_own_rule_over_thinned_out_task_vectors_keeps_their_thresholds_as_ours_do(tmp_path: Path) -> None:
    own.technique("summed", formula="sum", params=(DENSITY, GRANULARITY, COUNT_FROZEN), thin=TopMagnitudes)(
        Sum
    )
    files, kept = Files(tmp_path), tmp_path / "kept"
    ours = tmp_path / "ours.safetensors"
    for name, out in (("summed", files.out), ("ties", ours)):
        params = {"density": 0.5, "scale": 0.25}
        merge(name, params, files.start, files.paths[:1], out, keep_thresholds=kept)
    (file,) = kept.iterdir()
    assert len(json.loads(file.read_text())["entries"]) == 1  # what the first found, the second used
    assert values(files.out) == values(ours)


def test_own_rule_may_see_tensors_whole(tmp_path: Path) -> None:
    own.technique("halved", formula="sum / 2")(Halved)
    files = Files(tmp_path)
    found = files.merge("halved", {"logit_scale": "base"})
    expected = files.merge("task_arithmetic", {"scale": 0.5, "logit_scale": "base"})
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_name_of_a_built_in_technique_and_a_second_one_are_refused() -> None:
    with pytest.raises(TechniqueError, match="there is a technique 'ties' already"):
        declare("ties")
    first = declare()
    own.register(first)
    other = dataclasses.replace(first, origin=Origin("elsewhere", "0" * 64))
    with pytest.raises(TechniqueError, match="declared twice"):
        own.register(other)


def module(room: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (room / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(room))


WRITTEN = """
    from merge_service.techniques import technique

    @technique("installed", formula="mean")
    def installed(xp, params, blocks):
        return sum(blocks) / len(blocks)
"""


def test_installed_technique_is_known_and_a_broken_one_says_why_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(tmp_path, "package_of_techniques", WRITTEN, monkeypatch)
    entries = [
        EntryPoint("installed", "package_of_techniques:installed", registry.GROUP),
        EntryPoint("gone", "nowhere_to_be_found:gone", registry.GROUP),
        EntryPoint("other", "package_of_techniques:installed", registry.GROUP),
        EntryPoint("ties", "package_of_techniques:installed", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entries", lambda: entries)
    registry._installed.cache_clear()
    techniques.forget_table()
    assert "installed" in names() and get("installed").origin is not None
    assert get("average").origin is None
    for name, why in (
        ("gone", "cannot be loaded"),
        ("other", "not a technique called other"),
        ("ties", "built-in"),
    ):
        with pytest.raises(TechniqueError, match=why):
            get(name)


def test_other_process_loads_the_module_and_refuses_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(tmp_path, "loaded_techniques", WRITTEN.replace("installed", "loaded"), monkeypatch)
    source = hashlib.sha256((tmp_path / "loaded_techniques.py").read_bytes()).hexdigest()
    with pytest.raises(TechniqueError, match="cannot be imported here"):
        own.load("loaded", Origin("no_such_module_anywhere", source))
    own.load("loaded", Origin("loaded_techniques", source))
    assert get("loaded").origin == Origin("loaded_techniques", source)
    with pytest.raises(TechniqueError, match="install one version on every node"):
        own.load("loaded", Origin("loaded_techniques", "0" * 64))


def test_technique_written_in_the_program_itself_cannot_go_to_workers() -> None:
    mine = declare()
    own.check_importable(mine)
    with pytest.raises(TechniqueError, match="written in the program itself"):
        own.check_importable(dataclasses.replace(mine, origin=Origin("__main__", mine.origin.source)))


def test_merged_file_says_by_which_source_it_was_made(tmp_path: Path) -> None:
    declare()
    files = Files(tmp_path)
    merge("mine", {}, files.start, files.paths, files.out)
    assert set(made(files.out)) == {"technique", "form", "params", "inputs", "source", "base", "versions"}
