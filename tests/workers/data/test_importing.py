"""Imports of users' data: folders of classes, tables of paths, Hugging Face datasets on disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from merge_service.errors import UserError
from workers.data.decode import load
from workers.data.importing import Columns, Order, Shares, import_data, order_of
from workers.data.manifest import SUITE_FILE, describe, read_suite, verify
from workers.jobs import Source

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0)}


def picture(path: Path, colour: str, number: int = 0, **how: Any) -> Path:
    """A picture of one colour, different for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), tuple(value + number for value in COLOURS[colour])).save(path, **how)
    return path


def folders(place: Path, count: int = 10, ending: str = "png") -> Path:
    for colour in COLOURS:
        for number in range(count):
            picture(place / colour / f"{number}.{ending}", colour, number)
    return place


def bytes_under(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()
    }


def seen(root: Path, name: str, split: str, cache: Path) -> list[tuple[str, int]]:
    """The class of every sample, and the red value of its first pixel."""
    samples = load(Source(str(root), name, split), 8, cache)
    return [
        (samples.classes[label], int(samples.images[at][0, 0, 0])) for at, label in enumerate(samples.labels)
    ]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_of_class_folders_becomes_three_splits_that_can_be_read(tmp_path: Path) -> None:
    made = import_data(Order(folders(tmp_path / "colours"), templates=("a {c} square",)), tmp_path / "root")
    assert (made.kind, made.classes, dict(made.samples)) == (
        "classification",
        2,
        {"test": 4, "train": 14, "val": 2},
    )
    info = describe(made.root, "colours")
    assert (info.classes, info.templates) == (("green", "red"), ("a {c} square",))
    for split in info.splits:
        verify(made.root, "colours", split, decode=True)
    assert {(name, red > 100) for name, red in seen(made.root, "colours", "train", tmp_path)} == {
        ("green", False),
        ("red", True),
    }
    assert read_suite(made.root)["roles"] == {"pretraining": [], "adaptation": ["colours"], "held_out": []}


def test_same_source_gives_the_same_bytes_whatever_the_order_of_its_files(tmp_path: Path) -> None:
    one, other = folders(tmp_path / "a" / "set"), tmp_path / "b" / "set"
    for path in sorted(one.rglob("*.png"), reverse=True):
        copy = other / path.relative_to(one)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    import_data(Order(one), tmp_path / "one" / "root")
    import_data(Order(other), tmp_path / "other" / "root")
    assert bytes_under(tmp_path / "one") == bytes_under(tmp_path / "other")


def test_second_import_of_the_same_source_changes_nothing_and_another_one_is_refused(tmp_path: Path) -> None:
    order, root = Order(folders(tmp_path / "set")), tmp_path / "root"
    assert import_data(order, root).written
    before = bytes_under(root)
    assert not import_data(order, root).written
    assert bytes_under(root) == before
    picture(tmp_path / "set" / "red" / "new.png", "red", 50)
    with pytest.raises(UserError, match="holds something else"):
        import_data(order, root)
    assert bytes_under(root) == before


def test_stated_splits_stay_and_a_missing_one_is_cut_from_train(tmp_path: Path) -> None:
    for at, split in enumerate(("train", "validation")):
        for colour in COLOURS:
            for number in range(10):
                picture(tmp_path / "set" / split / colour / f"{number}.png", colour, number + 20 * at)
    made = import_data(Order(tmp_path / "set"), tmp_path / "root")
    assert dict(made.samples) == {"test": 4, "train": 16, "val": 20}
    assert any("no test split: cut from train (--test 0" in note for note in made.notes)


def test_pictures_of_other_formats_become_png_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    source = folders(tmp_path / "set", 4, "bmp")
    kept = picture(source / "red" / "kept.jpg", "red", 40).read_bytes()
    import_data(Order(source), tmp_path / "root")
    shards = b"".join(path.read_bytes() for path in (tmp_path / "root").rglob("*.tar"))
    assert kept in shards and b".bmp" not in shards and b"s0000000.png" in shards


def test_equal_pictures_are_kept_together_when_splits_are_made(tmp_path: Path) -> None:
    source = folders(tmp_path / "set", 12)
    for number in range(12):
        picture(source / "red" / f"copy-{number}.bmp", "red", number)
    root = import_data(Order(source), tmp_path / "root").root
    splits = {
        split: {red for name, red in seen(root, "set", split, tmp_path) if name == "red"}
        for split in ("train", "val", "test")
    }
    assert splits["train"] | splits["val"] | splits["test"] == set(range(200, 212))
    assert all(
        not splits[one] & splits[other]
        for one, other in (("train", "val"), ("train", "test"), ("val", "test"))
    )


def test_equal_pictures_in_stated_splits_are_refused_by_name_or_dropped_from_training(tmp_path: Path) -> None:
    for colour in COLOURS:
        for number in range(4):
            picture(tmp_path / "set" / "train" / colour / f"{number}.png", colour, number)
        picture(tmp_path / "set" / "test" / colour / "same.bmp", colour, 3)
    order = Order(tmp_path / "set", shares=Shares(val=0))
    with pytest.raises(
        UserError, match=r"2 pictures are in more than one split(.|\n)*--equal drop(.|\n)*red/3.png"
    ):
        import_data(order, tmp_path / "root")
    assert not (tmp_path / "root" / "set").exists()
    made = import_data(Order(tmp_path / "set", shares=Shares(val=0), drop_equal=True), tmp_path / "root")
    assert dict(made.samples) == {"test": 2, "train": 6}


def test_every_picture_that_cannot_be_read_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    source = folders(tmp_path / "set", 6)
    cut = source / "green" / "cut.png"
    cut.write_bytes((source / "green" / "0.png").read_bytes()[:40])
    (source / "red" / "page.jpg").write_text("<html>")
    with pytest.raises(UserError) as error:
        import_data(Order(source), tmp_path / "root")
    assert "2 pictures cannot be read" in str(error.value)
    assert all(str(path) in str(error.value) for path in (cut, source / "red" / "page.jpg"))
    assert not (tmp_path / "root").exists()
    made = import_data(Order(source, drop_unreadable=True), tmp_path / "root")
    assert sum(made.samples.values()) == 12
    assert sum(str(cut) in note or "page.jpg" in note for note in made.notes) == 2


def test_import_that_fails_while_it_writes_leaves_no_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, root = Order(folders(tmp_path / "set")), tmp_path / "root"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("workers.data.writer.write_manifest", full)
        with pytest.raises(UserError, match="No space left"):
            import_data(order, root)
    assert list(root.iterdir()) == []
    assert import_data(order, root).written


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda place: place.mkdir(), "holds no class folders"),
        (lambda place: picture(place / "set" / "red" / "0.png", "red"), "import it by itself"),
        (lambda place: [picture(place / one / "0.png", "red") for one in ("train/red", "other")], "splits .train. beside other folders"),
        (lambda place: [picture(place / "red" / "0.png", "red"), (place / "metadata.csv").write_text("a")], "metadata.csv"),
        (lambda place: None, "does not exist"),
        (lambda place: [picture(place / one / f"{n}.png", "red", n) for one in ("a_b", "a b") for n in range(4)], "have the same name"),
        (lambda place: picture(place / "red" / "0.png", "red"), "role adaptation needs samples for test"),
    ],
    ids=["empty", "datasets", "mixed", "described", "missing", "alike", "single"],
)  # fmt: skip
def test_folder_that_is_no_dataset_is_refused_with_the_reason(tmp_path: Path, make: Any, said: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(UserError, match=said):
        import_data(Order(tmp_path / "set"), tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_files_that_are_no_pictures_are_named_in_a_note(tmp_path: Path) -> None:
    source = folders(tmp_path / "set")
    (source / "red" / "list.txt").write_text("x")
    made = import_data(Order(source), tmp_path / "root")
    assert [note for note in made.notes if "list.txt" in note]


def test_nothing_of_a_folder_is_left_out_without_a_word(tmp_path: Path) -> None:
    """As reported of another loader: pictures beside class folders became a class of their own, or were lost."""
    source = folders(tmp_path / "set")
    picture(source / "stray.png", "red", 50)
    (source / "list.csv").write_text("x")
    (source / "blue").mkdir()
    notes = import_data(Order(source), tmp_path / "root").notes
    for said, name in (
        ("1 pictures are in no class", "stray.png"),
        ("1 files", "list.csv"),
        ("1 folders", "blue"),
    ):
        assert [note for note in notes if note.startswith(said) and note.endswith(f"{source / name}")]
    parts = tmp_path / "parts"
    for split, number in (("train", 0), ("test", 20)):
        picture(parts / split / "red" / "0.png", "red", number)
        picture(parts / split / "green" / "0.png", "green", number)
    picture(parts / "lost.png", "red", 50)
    notes = import_data(Order(parts, shares=Shares(val=0)), tmp_path / "root").notes
    assert [note for note in notes if "no class folder" in note and "lost.png" in note]


def test_training_pictures_that_another_dataset_is_scored_on_are_counted(tmp_path: Path) -> None:
    """As reported of benchmarks: test pictures of one set are training pictures of another, in another format."""
    root = tmp_path / "root"
    task = import_data(Order(folders(tmp_path / "task")), root)
    assert task.notes == ()
    held = import_data(Order(folders(tmp_path / "held", ending="bmp"), roles=("held_out",)), root)
    (note,) = [note for note in held.notes if "task/train and held/test" in note]
    common = {*seen(root, "task", "train", tmp_path)} & {*seen(root, "held", "test", tmp_path)}
    assert note.startswith(f"{len(common)} pictures are in both")
    again = import_data(Order(tmp_path / "task"), root)
    assert not again.written and any("task/train and held/test" in note for note in again.notes)
    other = folders(tmp_path / "other")
    for path in other.rglob("*.png"):
        picture(path, path.parent.name, int(path.stem) + 30)
    assert import_data(Order(other), root).notes == ()
    (root / "task" / "pictures" / "train.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"task/pictures/train.npy is damaged"):
        import_data(Order(other, "third"), root)


def test_class_names_that_differ_in_case_alone_are_said(tmp_path: Path) -> None:
    for at, name in enumerate(("crane", "Crane", "dog")):
        for number in range(4):
            picture(tmp_path / "set" / name / f"{number}.png", "red", number + 4 * at)
    made = import_data(Order(tmp_path / "set"), tmp_path / "root")
    assert [note for note in made.notes if "'Crane', 'crane' differ in case or spaces only" in note]


def test_class_names_come_from_a_file_or_from_folders_without_underscores(tmp_path: Path) -> None:
    source = tmp_path / "set"
    for name, colour in (("n01", "red"), ("n02", "green")):
        for number in range(4):
            picture(source / name / f"{number}.png", colour, number)
    (tmp_path / "names.yaml").write_text("n02: traffic light\nn01: stop sign\n")
    root = tmp_path / "root"
    import_data(Order(source, "named", classnames=tmp_path / "names.yaml"), root)
    assert describe(root, "named").classes == ("traffic light", "stop sign")
    (tmp_path / "names.yaml").write_text("n02: traffic light\n")
    with pytest.raises(UserError, match="no name for the label 'n01'"):
        import_data(Order(source, "other", classnames=tmp_path / "names.yaml"), root)


def test_datasets_of_several_roles_share_a_root(tmp_path: Path) -> None:
    root, source = tmp_path / "root", folders(tmp_path / "set")
    import_data(Order(source, "task"), root)
    held = import_data(Order(source, "held", ("held_out",)), root)
    import_data(Order(source, "pool", ("pretraining", "held_out")), root)
    assert read_suite(root)["roles"] == {
        "pretraining": ["pool"],
        "adaptation": ["task"],
        "held_out": ["held", "pool"],
    }
    assert dict(held.samples) == {"test": 18, "val": 2}  # nobody trains on it
    half = import_data(order_of(source, name="half", role="held_out", val=0.5), tmp_path / "other")
    assert dict(half.samples) == {"test": 10, "val": 10}
    with pytest.raises(UserError, match="not both"):
        import_data(Order(source, "both", ("adaptation", "held_out")), root)


def test_suite_that_is_made_of_packages_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "mini"
    root.mkdir()
    text = json.dumps(
        {"roles": {"pretraining": [], "adaptation": [], "held_out": []}, "made_of": {"numpy": "2"}}
    )
    (root / SUITE_FILE).write_text(text)
    with pytest.raises(UserError, match="cannot be changed"):
        import_data(Order(folders(tmp_path / "set")), root)
    assert [path.name for path in root.iterdir()] == [SUITE_FILE]


def test_class_that_bears_the_name_of_a_split_is_a_class(tmp_path: Path) -> None:
    """As reported of another loader: one picture or class called "train", and every other is lost."""
    for name in ("train", "car", "photo of test tubes"):
        for number in range(4):
            picture(tmp_path / "set" / name / f"train-{number}.png", "red", number + 4 * len(name))
    made = import_data(Order(tmp_path / "set"), tmp_path / "root")
    assert describe(made.root, "set").classes == ("car", "photo of test tubes", "train")
    assert sum(made.samples.values()) == 12


def test_table_among_the_pictures_is_used_and_pictures_in_no_row_are_named(tmp_path: Path) -> None:
    """As reported of another loader: the table is ignored, depending on where it lies."""
    for number in range(8):
        picture(tmp_path / "whole" / "images" / f"{number}.png", "red", number)
    rows = [f"images/{number}.png,caption {number}" for number in range(7)]
    (tmp_path / "whole" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    made = import_data(Order(tmp_path / "whole"), tmp_path / "root")
    assert made.kind == "retrieval" and sum(made.samples.values()) == 7
    assert any("1 pictures are in no row" in note and "7.png" in note for note in made.notes)
    for at, split in enumerate(("train", "test")):
        picture(tmp_path / "parts" / split / "0.png", "green", at)
        (tmp_path / "parts" / split / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}')
    assert dict(import_data(Order(tmp_path / "parts", shares=Shares(val=0)), tmp_path / "root").samples) == {
        "test": 1,
        "train": 1,
    }


def test_classes_named_by_codes_are_said(tmp_path: Path) -> None:
    """As reported of a benchmark: WordNet ids as class names, and a score of 5 % without a word."""
    for name, colour in (("n01855672", "red"), ("n02091244", "green")):
        for number in range(4):
            picture(tmp_path / "set" / name / f"{number}.png", colour, number)
    made = import_data(Order(tmp_path / "set"), tmp_path / "root")
    assert any("named by numbers or codes (n01855672, n02091244" in note for note in made.notes)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_table_of_paths_and_labels_with_its_own_splits(tmp_path: Path) -> None:
    rows = ["filepath;class;split"]
    for at, split in enumerate(("train", "valid", "test")):
        for colour in COLOURS:
            picture(tmp_path / "photos" / f"{split}-{colour}.jpg", colour, at)
            rows.append(f"photos/{split}-{colour}.jpg;{colour};{split}")
    (tmp_path / "table.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    made = import_data(Order(tmp_path / "table.csv", "mine"), tmp_path / "root")
    assert dict(made.samples) == {"test": 2, "train": 2, "val": 2}
    assert describe(tmp_path / "root", "mine").classes == ("green", "red")


def test_table_of_captions_is_a_retrieval_set_in_which_each_picture_stands_once(tmp_path: Path) -> None:
    rows = ["image\tcaption"]
    for number in range(10):
        picture(tmp_path / f"{number}.png", "red", number)
        rows += [f"{number}.png\ta red square, number {number}", f"{number}.png\tred"]
    (tmp_path / "captions.tsv").write_text("\n".join(rows))
    made = import_data(Order(tmp_path / "captions.tsv", roles=("held_out",)), tmp_path / "root")
    assert (made.kind, dict(made.samples)) == ("retrieval", {"test": 9, "val": 1})
    samples = load(Source(str(made.root), "captions", "test"), 8, tmp_path)
    assert all(len(texts) == 2 and texts[0].startswith("a red square, number") for texts in samples.captions)


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_table_of_paths_and_titles_is_read_whatever_separates_them(tmp_path: Path, separator: str) -> None:
    """As reported of a trainer: KeyError 'filepath', for the table was separated by something else than its default."""
    rows = ["filepath,title"] + [
        f"{picture(tmp_path / f'{n}.png', 'red', n).name},red {n}" for n in range(10)
    ]
    (tmp_path / "train.csv").write_text("\n".join(rows).replace(",", separator))
    assert import_data(Order(tmp_path / "train.csv"), tmp_path / "root").samples["train"] == 7


def test_json_list_of_pictures_and_captions(tmp_path: Path) -> None:
    rows = [
        {"id": n, "image": picture(tmp_path / f"{n}.png", "red", n).name, "caption": f"red {n}"}
        for n in range(10)
    ]
    (tmp_path / "meta.json").write_text(json.dumps(rows))
    assert import_data(Order(tmp_path / "meta.json"), tmp_path / "root").kind == "retrieval"


def test_json_lines_as_image_folders_have_them(tmp_path: Path) -> None:
    lines = []
    for number in range(10):
        picture(tmp_path / "set" / f"{number}.png", "green", number)
        lines.append(json.dumps({"file_name": f"{number}.png", "text": ["a", f"b{number}"]}))
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    made = import_data(Order(tmp_path / "set" / "metadata.jsonl"), tmp_path / "root")
    assert (made.name, made.kind, made.samples["train"]) == ("set", "retrieval", 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\n", "has no rows"),
        ("path,width\nx.png,3\n", "neither labels nor captions"),
        ("address,label\nx.png,red\n", "no column of pictures; name one of address, label"),
        ("path,label,class\nx.png,red,green\n", "several columns that may be the label: label, class; choose one with --label-column"),
        ("path,label\nx.png,\n", "line 2: the column 'label' is empty"),
        ("path,label\nhttps://example.org/x.png,red\n", "line 2: 'https://example.org/x.png' is not the path .* download it first"),
        ("path,label\nx.png,red\nx.png,green\n", "x.png has the label 'red' in .* line 2 and 'green' in .* line 3"),
        ("path,caption\nx.png,red, and large\n", "line 2 has a different number of values"),
        ("path,label,split\nx.png,red,holdout\n", "'holdout' is not the name of a split"),
        ("path,label\nx.png,red\ny.png,red\n", r"2 pictures cannot be read(.|\n)*x.png \(.* line 2\): No such file"),
    ],
    ids=["empty", "neither", "no-picture", "several", "blank", "address", "contrary", "ragged", "split", "absent"],
)  # fmt: skip
def test_table_that_cannot_be_used_is_refused_at_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        import_data(Order(tmp_path / "table.csv"), tmp_path / "root")


# --- Hugging Face datasets --------------------------------------------------------------------------------------------

FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["stop", "go"]}}


def rows(room: Path, first: int, count: int) -> pa.Table:
    """Pictures in a table, as `datasets` keeps them."""
    held = []
    for number in range(first, first + count):
        file = picture(room / "one.png", ("red", "green")[number % 2], number)
        held.append({"bytes": file.read_bytes(), "path": f"{number}.png"})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table(
        {"image": pa.array(held, kind), "label": pa.array([n % 2 for n in range(count)], pa.int64())}
    )


def saved(home: Path, table: pa.Table, features: Mapping[str, Any] = FEATURES) -> Path:
    """A split as `Dataset.save_to_disk` writes it: Arrow streams, a state and a description."""
    home.mkdir(parents=True)
    half = table.num_rows // 2
    names = []
    for at, part in enumerate((table.slice(0, half), table.slice(half))):
        names.append(f"data-{at:05}-of-00002.arrow")
        with pa.OSFile(str(home / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    (home / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (home / "dataset_info.json").write_text(json.dumps({"features": features}))
    return home


def test_dataset_saved_with_its_splits_keeps_them_and_its_class_names(tmp_path: Path) -> None:
    home = tmp_path / "signals"
    for at, (split, count) in enumerate((("train", 12), ("test", 4))):
        saved(home / split, rows(tmp_path, 20 * at, count))
    (home / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    made = import_data(Order(home, shares=Shares(val=0)), tmp_path / "root")
    assert dict(made.samples) == {"test": 4, "train": 12}
    assert describe(made.root, "signals").classes == ("stop", "go")
    assert {(name, red > 100) for name, red in seen(made.root, "signals", "test", tmp_path)} == {
        ("stop", True),
        ("go", False),
    }


def test_dataset_saved_whole_is_divided(tmp_path: Path) -> None:
    made = import_data(Order(saved(tmp_path / "set", rows(tmp_path, 0, 20))), tmp_path / "root")
    assert dict(made.samples) == {"test": 4, "train": 14, "val": 2}


def test_parquet_files_of_several_row_groups_are_read_by_the_split_in_their_names(tmp_path: Path) -> None:
    about = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}
    for at, (name, count) in enumerate((("train-00000-of-00001", 10), ("validation-00000-of-00001", 4))):
        file = tmp_path / "set" / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows(tmp_path, 20 * at, count).replace_schema_metadata(about), file, row_group_size=3)
    made = import_data(Order(tmp_path / "set"), tmp_path / "root")
    assert dict(made.samples) == {"test": 2, "train": 8, "val": 4}
    assert describe(made.root, "set").classes == ("stop", "go")


def test_row_whose_picture_cannot_be_read_is_named_by_file_and_number(tmp_path: Path) -> None:
    table = rows(tmp_path, 0, 6)
    images = table.column("image").to_pylist()
    images[4] = {"bytes": b"no picture", "path": None}
    images[5] = {"bytes": None, "path": None}
    table = table.set_column(0, "image", pa.array(images, table.schema.field("image").type))
    pq.write_table(table, tmp_path / "set.parquet", row_group_size=2)
    with pytest.raises(
        UserError, match=r"2 pictures cannot be read(.|\n)*set.parquet, row 4: is not a picture(.|\n)*row 5: "
    ):
        import_data(Order(tmp_path / "set.parquet"), tmp_path / "root")


def test_dataset_with_two_label_columns_asks_which(tmp_path: Path) -> None:
    table = rows(tmp_path, 0, 20)
    table = table.append_column("fine", table.column("label"))
    both = {**FEATURES, "fine": FEATURES["label"]}
    home = saved(tmp_path / "set", table, both)
    with pytest.raises(UserError, match="label, fine; choose one with --label-column"):
        import_data(Order(home), tmp_path / "root")
    assert import_data(Order(home, columns=Columns(label="fine")), tmp_path / "root").classes == 2


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    table = rows(tmp_path, 0, 4).set_column(1, "label", pa.array([0, 1, -1, 0]))
    pq.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(UserError, match="row 2 has no label"):
        import_data(Order(tmp_path / "set.parquet"), tmp_path / "root")


def test_file_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.parquet").write_bytes(np.random.default_rng(0).bytes(100))
    with pytest.raises(UserError, match="cannot be read"):
        import_data(Order(tmp_path / "set.parquet"), tmp_path / "root")
