"""Findings about data that plan, run and evaluate report before anything is trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.plan.facts import cache_of, gather
from pipeline.plan.prompt_notes import prompt_notes
from pipeline.study.config import load_study
from tests.workers.data.test_contents import broken_inside, dataset, encode_image
from tests.world import Cluster, World, command, make_world

Cli = Callable[..., Any]
NAMES = "dark\nmiddle\nlight\n"


@pytest.fixture
def place(tmp_path: Path) -> World:
    """A world to damage, with a foreign dataset `odd` of six pictures beside its tasks."""
    made = make_world(tmp_path)
    pixels = [np.full((16, 16, 3), 40 * index, np.uint8) for index in range(6)]
    write(
        made, [(encode_image(Image.fromarray(one)), b"%d" % (index % 3)) for index, one in enumerate(pixels)]
    )
    return made


def write(world: World, samples: list[tuple[bytes, bytes]], names: str = NAMES) -> Path:
    home = world.home / "data" / "odd"
    shutil.rmtree(home, ignore_errors=True)
    dataset(home, [{"png": picture, "cls": label} for picture, label in samples])
    shutil.copytree(home / "test", home / "train")
    (home / "classnames.txt").write_bytes(names.encode())
    return home


def study(world: World, **changes: Any) -> Path:
    return world.study(stream={"tasks": ["odd", "red"]}, **changes)


def picture(**more: Any) -> bytes:
    return encode_image(Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)), **more)


@pytest.mark.parametrize(
    ("picture_of", "label", "says"),
    [
        (picture, b"dark", "sample 's1' has the class 'dark'"), (picture, b"0.0", "sample 's1' has the class '0.0'"),
        (picture, b"3", "sample 's1' has the class '3'; classnames.txt holds 3"),
        (lambda: picture(form="JPEG", quality=95)[:-200], b"0", "image 's1.png' cannot be"),
        (lambda: picture()[:-30], b"0", "'s1.png'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_bad_sample_is_refused_by_name_before_anything_runs(
    place: World,
    cli: Cli,
    verb: str,
    picture_of: Callable[[], bytes],
    label: bytes,
    says: str,
    tmp_path: Path,
) -> None:
    write(place, [(picture(), b"0"), (picture_of(), label)])
    answer = cli(verb, study(place), "--out", tmp_path / "out")
    assert answer.code == 2 and says in answer.err and "odd/" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "says"), [("dark\n\nlight\n", "line 2 is blank"), ("dark\nmid\xe9\n", None)]
)
def test_class_list_is_read_as_it_was_meant(
    place: World, cli: Cli, names: str, says: str | None, tmp_path: Path
) -> None:
    write(place, [(picture(), b"0"), (picture(), b"1")], names)
    answer = cli("plan", study(place), "--out", tmp_path / "out")
    assert answer.code == (2 if says else 0) and (says or "") in answer.err


def test_split_without_samples_is_refused(place: World, cli: Cli, tmp_path: Path) -> None:
    home = write(place, [])
    assert (home / "test" / "0.tar").exists()
    answer = cli("plan", study(place), "--out", tmp_path / "out")
    assert answer.code == 2 and "split of dataset odd holds no sample" in answer.err


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 3
    return picture(exif=exif)


def test_converted_pictures_are_said_and_rename_their_steps_alone(
    place: World, cli: Cli, tmp_path: Path
) -> None:
    before = gather(load_study(study(place)).resolved())
    write(place, [(turned(), b"0"), (picture(), b"1")])
    answer = cli("plan", study(place), "--json", "--out", tmp_path / "out")
    (said, other) = json.loads(answer.out)["notes"]
    assert "dataset 'odd': 1 of 2 pictures of train are turned by EXIF" in said and "of test" in other
    after = gather(load_study(study(place)).resolved())
    plain = {name: facts.digests for name, facts in after.datasets.items() if name != "odd"}
    assert plain == {name: facts.digests for name, facts in before.datasets.items() if name != "odd"}
    from workers.data.manifest import describe

    shards = describe(place.home / "data", "odd", cache_of(load_study(study(place)))).splits
    assert after.datasets["odd"].digests["train"] != shards["train"].digest
    assert before.datasets["odd"].digests.keys() == shards.keys()
    assert "turned by EXIF" in cli("plan", study(place), "--out", tmp_path / "out").out


def test_long_reading_is_said_once(
    place: World, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.plan.facts.LARGE_BYTES", 1)
    first = cli("plan", study(place), "--out", tmp_path / "out").err
    assert "odd: reading its" in first and "red: reading its" in first  # one without, one with a manifest
    again = cli("plan", study(place), "--out", tmp_path / "out").err
    assert "reading its" not in again


def test_classes_with_the_same_tokens_are_named_by_plan_and_evaluate(
    place: World, cli: Cli, tmp_path: Path
) -> None:
    from workers.models.model import export_base

    write(place, [(picture(), b"0"), (picture(), b"1")], "A\na\nlight\n")
    export_base(str(place.home / "model.json"), None, tmp_path / "base", 0)
    file = study(
        place, model={"config": str(place.home / "model.json"), "pretrained": str(tmp_path / "base")}
    )
    for _ in range(2):
        answer = cli("plan", file, "--out", tmp_path / "out")
        assert "cannot be told apart: 'A', 'a' (the tokenizer writes them alike)" in answer.out
    answer = cli("evaluate", tmp_path / "base", "--study", file, "--datasets", "odd")
    assert answer.code == 0 and "cannot be told apart: 'A', 'a'" in answer.err


@pytest.mark.parametrize(
    "model", [{"config": "{home}/model.json"}, {"config": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}]
)
def test_classes_with_the_same_tokens_are_named_for_a_base_that_is_still_to_come(
    place: World, cli: Cli, tmp_path: Path, model: dict[str, str]
) -> None:
    write(place, [(picture(), b"0"), (picture(), b"1")], "A\na\nlight\n")
    file = study(place, model={key: value.format(home=place.home) for key, value in model.items()})
    answer = cli("plan", file, "--out", tmp_path / "out")
    assert (
        answer.code == 0 and "cannot be told apart: 'A', 'a' (the tokenizer writes them alike)" in answer.out
    )


def test_dataset_of_one_class_is_named_since_its_score_is_always_1(
    place: World, cli: Cli, tmp_path: Path
) -> None:
    write(place, [(picture(), b"0")] * 2, "only\n")
    answer = cli("plan", study(place), "--out", tmp_path / "out")
    assert answer.code == 0 and answer.out.count("'odd' has one class, so every model scores 1") == 1


def test_tokenizer_that_cannot_be_loaded_is_said_and_does_not_end_the_plan(
    place: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: Any) -> None:
        raise OSError("no route to the hub\nand more")

    monkeypatch.setattr("workers.scoring.prompts.alike_in", unreachable)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": {}}}')
    (said,) = prompt_notes(tmp_path / "base", str(place.home / "data"), ["red", "odd"], tmp_path / "cache")
    assert "were not compared" in said and "(no route to the hub)" in said


def test_classes_of_one_name_cannot_be_dealt_to_tasks(place: World, cli: Cli, tmp_path: Path) -> None:
    write(place, [(picture(), b"0"), (picture(), b"1")], "crane\ncrane\nlight\n")
    chunked = {"order": "random", "tasks": ["odd"], "chunks": 2}
    answer = cli("plan", place.study(stream=chunked), "--out", tmp_path / "out")
    assert answer.code == 2 and "two classes named 'crane'" in answer.err
    answer = cli("plan", study(place), "--out", tmp_path / "out")
    assert answer.code == 0 and "'crane' in lines 1, 2" in answer.out


def test_task_without_train_samples_is_refused(place: World, cli: Cli, tmp_path: Path) -> None:
    write(place, [(picture(), b"0"), (picture(), b"1")])
    chunked = {"order": "random", "tasks": ["odd"], "chunks": 3}
    answer = cli("plan", place.study(stream=chunked), "--out", tmp_path / "out")
    assert answer.code == 2 and "has no sample of light" in answer.err


@pytest.mark.parametrize(
    ("strategy", "batch", "mixture", "says"),
    [
        ("continual_finetuning", 8, (0.9, 0.05, 0.05), "update and buffer no sample of a batch of 8"),
        ("best_in_time", 16, (0.9, 0.05, 0.05), "buffer no sample of a batch of 16"),
        ("best_in_time", 2, (0.33, 0.34, 0.33), "buffer no sample of a batch of 2"),
        ("continual_finetuning_replay", 2, (0.0, 1.0, 0.0), "buffer no sample of a batch of 2"),
        ("zero_shot", 2, (0.33, 0.34, 0.33), None), ("multitask", 2, (0.0, 1.0, 0.0), None),
        ("best_in_time", 20, (0.9, 0.05, 0.05), None),
    ],
)  # fmt: skip
def test_share_that_comes_to_nothing_is_refused_by_plan(
    place: World,
    cli: Cli,
    strategy: str,
    batch: int,
    mixture: tuple[float, ...],
    says: str | None,
    tmp_path: Path,
) -> None:
    shares = dict(zip(("pretraining", "update", "buffer"), mixture, strict=True))
    recipe = {"lr": 1e-3, "batch_size": batch, "precision": "fp32", "mixture": shares}
    file = place.study(recipe=recipe, grid={"strategies": [strategy]})
    answer = cli("plan", file, "--out", tmp_path / "out")
    assert answer.code == (2 if says else 0), answer.err
    assert says is None or (says in answer.err and "batch_size of " in answer.err)


def test_read_only_place_beside_the_root_sends_the_cache_to_the_user(
    place: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = yaml.safe_load(place.study().read_text())
    del tree["data"]["cache"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    found = load_study(tmp_path / "study.yaml")
    assert cache_of(found) == tmp_path / ".cache"
    monkeypatch.setenv("TEMPORAL_MERGE_CACHE", str(tmp_path / "mine"))
    monkeypatch.setattr("pipeline.plan.facts.is_writable", lambda folder: False)
    assert cache_of(found) == tmp_path / "mine"
    (tmp_path / ".cache").mkdir()
    assert cache_of(found) == tmp_path / ".cache"  # files that others have made there are readable


@pytest.mark.ray
@pytest.mark.fault("F24")
def test_picture_that_only_decoding_finds_broken_ends_the_run_at_once_with_its_sample(
    place: World, cluster: Cluster, tmp_path: Path
) -> None:
    write(place, [(broken_inside(), b"0"), (picture(), b"1")])
    answer = command("run", study(place), "--out", tmp_path / "out", "--address", cluster.address)
    assert answer.returncode == 2
    assert "odd/" in answer.stderr and "image s0.png cannot be decoded" in answer.stderr
    assert "try 1" not in answer.stderr and "trying again" not in answer.stderr
