"""Hostile or broken study files, and files that they name: one error that names the key, and no other effect."""

import contextlib
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.plan.facts import gather
from pipeline.study.config import load_study
from pipeline.study.stream_tables import read_counts
from pipeline.study.streams import load as load_stream
from pipeline.study.suites import read_suite_file
from tests.faults.corpus_files import studies
from tests.faults.limits import ROOT, cost_of

Record = Callable[[str, object], None]
MUTATIONS = 1500
"""Together with the 500 mutated files of tests/pipeline/study/test_config_mistakes.py, these are 2,000."""
PIECES = [
    "[", "]", "{", "}", ": ", "\n", "- ", "&a ", "*a", "!!x ", "1e999", "1e308", ".nan", "-.inf", "null", "true", "-1", "2.5", '"',
    "'", "\\0", "\u2028", "é", "../../etc", "/etc/passwd", "~", "''", "[]", "{}", "[[]]", "9" * 400, "http://a:b@c:99999999", "s3://[",
    "!!python/object/apply:os.system ['touch canary']", "!!python/module:this", "%YAML 9.9\n", "---\n", "<<: ", "? ", "|\n", "@",
    "grid", "os.system", "{c}",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mutated(text: str, lines: list[str], chance: random.Random) -> str:
    """A study with one to four changes, as a typing error, a bad merge or an attacker would make."""
    for _ in range(chance.randint(1, 4)):
        rows = text.splitlines() or [""]
        row = chance.randrange(len(rows))
        match chance.randrange(5):
            case 0:
                del rows[row]
            case 1:
                rows.insert(row, chance.choice(lines))
            case 2:
                rows[row] = rows[row].partition(":")[0] + ": " + chance.choice(PIECES)
            case _:
                at, length = chance.randrange(len(text) + 1), chance.choice([0, 1, 1, 5, 20])
                piece = chance.choice([*PIECES, "", chr(chance.randrange(32, 0x3000))])
                rows = [text[:at] + piece + text[at + length :]]
        text = "\n".join(rows)
    return text


@pytest.mark.fault("F26")
def test_1500_mutations_of_our_own_studies_raise_nothing_but_configuration_errors(
    place: Path, record_property: Record
) -> None:
    own = [
        path
        for path in sorted((ROOT / "configs").rglob("*.yaml"))
        if "models" not in path.relative_to(ROOT).parts
    ]
    texts = {path: path.read_text() for path in own}
    lines = [line for text in texts.values() for line in text.splitlines()]
    chance, path, slowest, refused = random.Random(26), place / "study.yaml", 0.0, 0
    loaded = set(sys.modules)
    for _ in range(MUTATIONS):
        source = chance.choice(own)
        path.write_text(mutated(texts[source], lines, chance))
        began = time.perf_counter()
        try:
            if "datasets" in source.name:
                read_suite_file(path)
            else:
                study = load_study(path)
                assert study.cells
                with contextlib.suppress(
                    ConfigError
                ):  # what a study refers to is not beside the mutated file
                    study.resolved()
        except ConfigError as error:
            refused += 1
            assert error.problems and all(str(error).encode() for _ in error.problems)
        slowest = max(slowest, time.perf_counter() - began)
    assert MUTATIONS / 2 < refused < MUTATIONS and slowest < 5
    assert [entry.name for entry in place.iterdir()] == ["study.yaml"]
    assert "this" not in set(sys.modules) - loaded
    record_property("cases", MUTATIONS)
    record_property("slowest study", f"{slowest:.2f} s")


@pytest.mark.fault("F26")
def test_study_of_the_corpus_is_refused_by_its_path_without_time_memory_or_import(
    place: Path, record_property: Record
) -> None:
    (place / "ten megabytes.yaml").write_bytes(b"a: [" + b"1," * 5_000_000)
    (place / "deep.yaml").write_bytes(b"name: " + b"[" * 100_000)
    (place / "long line.yaml").write_bytes(b"name: " + b"a" * 250_000)
    (place / "many keys.yaml").write_bytes(b"\n".join(b"k%d: 1" % number for number in range(25_000)))
    (place / "many values.yaml").write_bytes(b"name: [" + b"a," * 9_000 + b"a]")
    made = set(place.iterdir())
    cost = cost_of("""
import os
from pipeline.study.config import load_study
from pipeline.errors import ConfigError
os.chdir(arguments[0])
loaded = set(sys.modules)
begin()
slowest = 0
for path in arguments[1:]:
    started = time.perf_counter()
    try:
        load_study(path)
        raise SystemExit(f"{path} was taken")
    except ConfigError as error:
        assert path in str(error) and len(str(error)) < 5000, (path, str(error)[:2000])
        str(error).encode()
    slowest = max(slowest, time.perf_counter() - started)
end(slowest=slowest, loaded=sorted(set(sys.modules) - loaded))
""", place, *studies(), *made)  # fmt: skip
    assert set(place.iterdir()) == made, "something was written"
    assert not [
        name
        for name in cost.more["loaded"]
        if name.split(".")[0] in ("this", "subprocess", "antigravity", "os")
    ]
    assert cost.grown < 50, f"{cost.grown:.0f} MB"
    assert cost.more["slowest"] < 5
    record_property("cases", len(studies()) + len(made))
    record_property("memory", f"{cost.grown:.0f} MB")
    record_property("slowest hostile study", f"{cost.more['slowest']:.2f} s")


@pytest.mark.fault("F26")
def test_wrong_key_of_a_mapping_with_fixed_keys_is_named_with_those_there_are(place: Path) -> None:
    text = (ROOT / "configs" / "fomo_in_flux" / "datasets.yaml").read_text()
    (place / "suite.yaml").write_text(text.replace("  held_out:", "  heldout:", 1))
    with pytest.raises(
        ConfigError, match=r"totals\.heldout: .*is not one of adaptation, held_out; did you mean held_out\?"
    ):
        read_suite_file(place / "suite.yaml")


TABLES = {
    "code.yaml": b"!!python/object/apply:os.system ['touch canary']", "deep.json": b"[" * 50_000, "deep.yaml": b"[" * 50_000,
    "nan.json": b'{"a": NaN}', "negative.csv": b"a,-1\n", "infinite.csv": b"a,inf\n", "digits.json": b'{"a": ' + b"9" * 5000 + b"}",
    "twice.json": b'{"a": 1, "a": 2}', "list.json": b"[1]", "text.json": b'{"a": "b"}', "binary.csv": b"\xff\xfe\0", "quote.csv": b'"a,1',
    "wide.csv": b"a,1,2\n", "field.csv": b"a" * 200_000 + b",1\nb", "empty.json": b"", "kind.pkl": b"a",
}  # fmt: skip


@pytest.mark.fault("F26")
@pytest.mark.parametrize("name", TABLES)
def test_table_or_stream_that_a_study_names_is_refused_by_its_path(name: str, place: Path) -> None:
    path = place / name
    path.write_bytes(TABLES[name])
    with pytest.raises(ConfigError, match=name) as caught:
        read_counts(path)
    assert len(str(caught.value)) < 2000
    with pytest.raises(ConfigError, match=name):
        load_stream(path)
    assert list(place.iterdir()) == [path]


ROLES = [
    "null",
    "3",
    '"text"',
    '{"a": 1}',
    "[3]",
    "[null]",
    '["../x"]',
    '["a/../../x"]',
    '["a", "a"]',
    '["a\\u0000"]',
    '["\\ud800"]',
    "[[]]",
]


@pytest.mark.fault("F26")
@pytest.mark.parametrize("role", ["pretraining", "adaptation", "held_out"])
def test_suite_under_a_root_with_a_role_that_lists_no_names_is_refused_by_that_role(
    role: str, place: Path, record_property: Record
) -> None:
    (place / "s.yaml").write_text(
        f"name: s\nmodel: {{config: tiny-clip}}\ndata: {{suite: mini, root: {place}}}\nbudget: {{steps_per_task: 1}}\n"
        "grid: {strategies: [zero_shot]}\n"
    )
    for value in ROLES:
        roles = {"pretraining": "[]", "adaptation": '["a"]', "held_out": "[]"} | {role: value}
        listed = ", ".join(f'"{name}": {names}' for name, names in roles.items())
        (place / "suite.json").write_text(f'{{"roles": {{{listed}}}}}')
        with pytest.raises(ConfigError, match=rf"suite\.json: `roles\.{role}`"):
            load_study(place / "s.yaml").resolved()
    record_property("cases", len(ROLES))


@pytest.mark.fault("F26")
@pytest.mark.parametrize(
    "root", ["a loop", "a link to nowhere", "a file", "a NUL", "a long name", "a long path"]
)
def test_data_root_that_leads_nowhere_is_an_error_of_ours(root: str, place: Path) -> None:
    if root == "a loop":
        (place / root).symlink_to(place / root)
    elif root == "a link to nowhere":
        (place / root).symlink_to(place / "nowhere")
    elif root == "a file":
        (place / root).write_text("x")
    value = {"a NUL": '"a\\0b"', "a long name": "n" * 300, "a long path": "n/" * 2000}.get(root, root)
    (place / "s.yaml").write_text(
        f"name: s\nmodel: {{config: tiny-clip}}\ndata: {{root: {value}, pretraining: [], held_out: []}}\n"
        "stream: {tasks: [a]}\nbudget: {steps_per_task: 1}\nrecipe: {mixture: {update: 1}}\ngrid: {strategies: [zero_shot]}\n"
    )
    with contextlib.suppress(UserError):
        study = load_study(place / "s.yaml").resolved()
        gather(study)
        pytest.fail("the root was taken")
