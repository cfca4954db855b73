"""Suite files: read strictly, described without data, and compared with a root."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_service.errors import UserError
from pipeline.errors import ConfigError
from pipeline.study.suites import Suite, check, missing, read_suite_file, summary
from tests.world import World, command
from workers.data.manifest import describe


def entry(name: str, role: str = "adaptation", **more: Any) -> dict[str, Any]:
    given = {
        "name": name,
        "role": role,
        "kind": "classification",
        "template": "a photo of {c}",
    }
    return {**given, **more}


def written(room: Path, *datasets: dict[str, Any], **more: Any) -> Path:
    path = room / "suite.yaml"
    path.write_text(yaml.safe_dump({"format": 1, "name": "toy", "datasets": list(datasets), **more}))
    return path


def suite_of(room: Path, *datasets: dict[str, Any], **more: Any) -> Suite:
    return read_suite_file(written(room, *datasets, **more))


def bare(root: Path, name: str, classes: int = 2, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """A folder in the layout of CLIP benchmark, with one empty shard per split and no manifest."""
    home = root / name
    for split in splits:
        (home / split).mkdir(parents=True)
        (home / split / "0.tar").write_bytes(b"\0" * 1024)
        (home / split / "nshards.txt").write_text("1\n")
    (home / "classnames.txt").write_text("".join(f"c{index}\n" for index in range(classes)))
    (home / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    return home


def test_every_mistake_in_a_suite_file_is_told_with_its_key(tmp_path: Path) -> None:
    wrong = [
        entry("a", role="adaption"),
        entry("b", template="no place"),
        entry("c", kind="retrieval"),
        entry("d", clases=3),
        entry("e", classes=0),
    ]
    with pytest.raises(ConfigError) as caught:
        read_suite_file(written(tmp_path, *wrong))
    text = str(caught.value)
    for said in (
        "datasets[0].role",
        "did you mean adaptation",
        "datasets[1].template",
        "{c}",
        "datasets[2]",
        "captions are whole",
        "did you mean datasets[3].classes",
        "datasets[4].classes",
    ):
        assert said in text


def test_two_datasets_of_one_name_or_a_suite_without_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two datasets have this name"):
        suite_of(tmp_path, entry("a"), entry("a"))
    with pytest.raises(ConfigError, match="nothing to learn"):
        suite_of(tmp_path, entry("a", role="held_out"))


def test_described_shares_what_the_total_leaves_among_unknown_counts(tmp_path: Path) -> None:
    totals = {"adaptation": {"classes": 10, "train": 100, "test": 7}}
    sets = [entry("a", classes=3, train=30), entry("b"), entry("c"), entry("z", role="held_out", classes=2)]
    described = suite_of(tmp_path, *sets, totals=totals).described()
    assert [len(described[name].classes) for name in "abcz"] == [3, 4, 3, 2]
    assert described["a"].classes == ("class-00001", "class-00002", "class-00003")
    assert [{k: v.samples for k, v in described[name].splits.items()} for name in "abc"] == [
        {"train": 30, "test": 3},
        {"train": 35, "test": 2},
        {"train": 35, "test": 2},
    ]
    assert list(described["z"].splits) == ["test"] and described["z"].splits["test"].samples == 1
    assert described["a"].templates == ("a photo of {c}",)


def test_roles_and_dates_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, entry("b", date=2011), entry("a", date="2010-05"), entry("z", role="held_out"))
    assert suite.roles == {"pretraining": (), "adaptation": ("b", "a"), "held_out": ("z",)}
    assert suite.dates == {"b": 2011, "a": "2010-05"}


def test_missing_folders_are_named_with_both_places_they_may_stand(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, entry("a", original="AAA"), entry("b"))
    bare(tmp_path, "wds_b")
    (found,) = missing(suite, tmp_path)
    assert (found.dataset, found.what) == ("a", "missing")
    for said in (str(tmp_path / "a"), str(tmp_path / "wds_a"), "AAA"):
        assert said in found.text
    assert missing(suite, tmp_path, ["b"]) == []
    with pytest.raises(UserError, match="no dataset 'q'"):
        missing(suite, tmp_path, ["q"])


def test_a_whole_root_without_manifests_has_no_findings_and_is_not_read(tmp_path: Path) -> None:
    bare(tmp_path, "a")
    assert check(suite_of(tmp_path, entry("a", classes=2)), tmp_path) == []


@pytest.mark.parametrize(
    "change, what, says",
    [
        ("classes", "wrong", "names 5 classes, the suite states 2"),
        ("kind", "wrong", "says retrieval, the suite classification"),
        ("split", "wrong", "convert the test split"),
        ("shards", "wrong", "nshards.txt states 3"),
        ("template", "differs", "let it hold the one line a photo of {c}"),
    ],
)
def test_what_does_not_fit_is_said_with_the_file_and_the_remedy(
    tmp_path: Path, change: str, what: str, says: str
) -> None:
    home = bare(tmp_path, "a", classes=5 if change == "classes" else 2)
    if change == "kind":
        (home / "dataset_type.txt").write_text("retrieval\n")
    elif change == "split":
        shutil.rmtree(home / "test")
    elif change == "shards":
        (home / "train" / "nshards.txt").write_text("3\n")
    elif change == "template":
        (home / "zeroshot_classification_templates.txt").write_text("{c}\n{c}!\n")
    (found,) = check(suite_of(tmp_path, entry("a", classes=2)), tmp_path)
    assert found.what == what and says in found.text and str(home) in found.text


def described_suite(room: Path, world: World, off: int = 0) -> Path:
    """A suite file that states the datasets of the world, or `off` samples more."""
    root, sets = world.home / "data", []
    for name in sorted(path.name for path in root.iterdir() if (path / "manifest.json").is_file()):
        info = describe(root, name)
        more: dict[str, Any] = {"kind": info.kind, "template": None}
        if info.kind == "classification":
            more |= {"template": info.templates[0], "classes": len(info.classes)}
        both = {"train", "test"} <= set(info.splits)
        role = "adaptation" if both else "held_out" if "test" in info.splits else "pretraining"
        samples = {split: of.samples + off for split, of in info.splits.items()}
        sets.append(entry(name, role=role, **more, **samples))
    return written(room, *sets)


def test_deep_check_of_an_own_root_finds_a_flipped_byte_that_manifests_do_not_show(
    world: World, tmp_path: Path
) -> None:
    suite = read_suite_file(described_suite(tmp_path, world))
    root = tmp_path / "data"
    shutil.copytree(world.home / "data", root)
    assert check(suite, root, deep=True, cache=tmp_path / "cache") == []
    name = suite.roles["adaptation"][0]
    shard = root / name / "train" / "0.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert check(suite, root) == []
    (found,) = check(suite, root, deep=True, cache=tmp_path / "other")
    assert (found.dataset, found.what) == (name, "wrong") and "flipped" in found.text


def test_other_sample_counts_differ_but_do_not_keep_a_study_from_running(
    world: World, tmp_path: Path
) -> None:
    suite = read_suite_file(described_suite(tmp_path, world, off=1))
    root = world.home / "data"
    findings = check(suite, root)
    assert findings and {found.what for found in findings} == {"differs"}
    assert summary(suite, root, findings)["complete"]


def test_command_ends_with_code_0_or_2_and_lists_the_same_in_json(world: World, tmp_path: Path, cli) -> None:
    suite = described_suite(tmp_path, world)
    whole = command("check", suite, "--root", world.home / "data")
    assert (whole.returncode, whole.stderr) == (0, "") and "are ready" in whole.stdout
    none = cli("check", suite, "--root", tmp_path / "nowhere", "--json")
    answer = json.loads(none.out)
    assert (none.code, none.err) == (2, "")
    assert not answer["complete"] and answer["usable"] == 0
    assert {found["what"] for found in answer["findings"]} == {"missing"}
