"""Streams: every class once, in the requested order, in near-equal tasks; files; and the message for each mistake."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, PlanError
from pipeline.study.mistakes import validate
from pipeline.study.sections_stream import StreamSection, period
from pipeline.study.stream_tables import read_counts
from pipeline.study.streams import (
    Part,
    Stream,
    StreamTask,
    elements_of,
    load,
    make_stream,
    participants,
    save,
)

PETS = tuple(f"pet {n}" for n in range(7))
CARS = tuple(f"car {n}" for n in range(4))
DIGITS = ("zero", "one", "two")
DATASETS: dict[str, tuple[str, ...]] = {"pets": PETS, "cars": CARS, "sketches": (), "digits": DIGITS}
DATES = {"cars": 2011, "pets": 2012, "digits": 1998, "sketches": 2011}
ELEMENTS = elements_of(DATASETS)
MEASURED = {
    element: (at * 7 % 5 / 5, -float(at)) for at, element in enumerate(elements_of(dict(sorted(DATASETS.items()))))
}  # fmt: skip


def section(**keys: Any) -> StreamSection:
    return StreamSection(**keys)


@pytest.fixture
def table(tmp_path: Path) -> str:
    names = {label: at % 3 for at, (dataset, label) in enumerate(ELEMENTS) if label} | {"sketches": 1}
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(names))
    return str(path)


def keys_of(order: str, table: str) -> dict[str, Any]:
    """A section for any order over classes."""
    more = {"frequency": {"table": table}, "time": {"dates": DATES}}
    return {"order": order, **more.get(order, {})}


def classes_of(task: StreamTask, datasets: dict[str, tuple[str, ...]] = DATASETS) -> list[tuple[str, str]]:
    return [
        (part.dataset, label)
        for part in task.parts
        for label in (part.classes or datasets[part.dataset] or ("",))
    ]


def one_by_one(stream: Stream) -> list[tuple[str, str]]:
    """The elements of a stream that was cut into tasks of one class."""
    return [element for task in stream.tasks for element in classes_of(task)]


def order_of(measured: Any = None, **keys: Any) -> list[tuple[str, str]]:
    return one_by_one(make_stream(section(chunks=len(ELEMENTS), **keys), DATASETS, measured))


ORDERS = ("dataset_incremental", "random", "performance", "similarity", "frequency", "time")


# --- all orders ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2, 4, 7, 14, 15])
@pytest.mark.parametrize("order", ORDERS)
def test_every_class_arrives_once_in_near_equal_tasks(order: str, chunks: int, table: str) -> None:
    stream = make_stream(section(chunks=chunks, **keys_of(order, table)), DATASETS, MEASURED)
    arrived = [classes_of(task) for task in stream.tasks]
    assert sorted(element for task in arrived for element in task) == sorted(ELEMENTS)
    sizes = [len(task) for task in arrived]
    assert len(sizes) == chunks and sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert Stream.from_json(json.loads(json.dumps(stream.to_json()))) == stream


@pytest.mark.parametrize("order", ORDERS)
def test_reverse_is_the_order_backwards(order: str, table: str) -> None:
    keys = keys_of(order, table)
    assert order_of(MEASURED, reverse=True, **keys) == order_of(MEASURED, **keys)[::-1]


@pytest.mark.parametrize("order", ORDERS[1:])
def test_order_of_the_mapping_does_not_count(order: str, table: str) -> None:
    asked = section(chunks=4, **keys_of(order, table))
    turned = {name: DATASETS[name] for name in reversed(DATASETS)}
    assert make_stream(asked, turned, MEASURED) == make_stream(asked, DATASETS, MEASURED)


@pytest.mark.parametrize("order", ["random", "frequency", "time"])
def test_seed_decides_what_is_drawn(order: str, table: str) -> None:
    keys = keys_of(order, table)
    drawn = [order_of(seed=seed, **keys) for seed in (0, 1, 1)]
    assert drawn[0] != drawn[1] == drawn[2]


def test_tasks_choose_whose_classes_take_part() -> None:
    stream = make_stream(section(order="random", chunks=2, tasks=("digits", "cars")), DATASETS)
    assert sorted(one_by_one(stream)) == sorted(
        elements_of({name: DATASETS[name] for name in ("cars", "digits")})
    )
    assert participants(section(), DATASETS) == tuple(DATASETS)


def test_whole_of_fomo_in_flux_in_twenty_tasks() -> None:
    datasets = {f"set{n}": tuple(f"class {k}" for k in range(448)) for n in range(41)}
    datasets["set0"] += tuple(f"more {k}" for k in range(13))
    assert sum(map(len, datasets.values())) == 18_381
    stream = make_stream(section(order="random", chunks=20), datasets)
    sizes = [len(classes_of(task, datasets)) for task in stream.tasks]
    assert sizes == [920] + [919] * 19
    assert all(len(task.parts) >= 36 for task in stream.tasks)


# --- one order each -------------------------------------------------------------------------------------------------------------


def test_dataset_incremental_gives_one_task_per_dataset() -> None:
    assert make_stream(section(), DATASETS) == Stream(
        tuple(StreamTask(name, (Part(name),)) for name in DATASETS)
    )
    backwards = make_stream(section(tasks=("cars", "pets"), reverse=True), DATASETS)
    assert [task.name for task in backwards.tasks] == ["pets", "cars"]


def test_dataset_incremental_in_chunks_cuts_datasets_in_their_order() -> None:
    stream = make_stream(section(chunks=3, tasks=("digits", "pets")), DATASETS)
    assert [classes_of(task) for task in stream.tasks] == [
        [("digits", label) for label in DIGITS] + [("pets", "pet 0")],
        [("pets", f"pet {n}") for n in (1, 2, 3)],
        [("pets", f"pet {n}") for n in (4, 5, 6)],
    ]
    assert stream.tasks[0].parts == (Part("digits"), Part("pets", ("pet 0",)))


def test_random_is_what_philox_draws() -> None:
    """Golden: raw Philox numbers, which no version of NumPy may change."""
    assert order_of(order="random", seed=3)[:5] == [
        ("digits", "two"),
        ("pets", "pet 6"),
        ("cars", "car 1"),
        ("pets", "pet 4"),
        ("pets", "pet 1"),
    ]


def test_performance_goes_from_easy_to_hard() -> None:
    found = order_of(MEASURED, order="performance")
    scores = [MEASURED[element] for element in found]
    assert scores == sorted(scores, reverse=True)
    level = order_of(dict.fromkeys(ELEMENTS, 0.5), order="performance")
    assert level == elements_of(dict(sorted(DATASETS.items())))


def test_similarity_goes_along_the_path() -> None:
    path = random.Random(1).sample(ELEMENTS, len(ELEMENTS))
    places = {element: place for place, element in enumerate(path)}
    assert order_of(places, order="similarity") == path


def test_frequency_begins_with_the_least_frequent(tmp_path: Path) -> None:
    rows = ["class,count", "sketches,4", *(f"{label},{n}" for n, label in enumerate(reversed(PETS)))]
    path = tmp_path / "c.csv"
    path.write_text("\n".join([*rows, "pets+++pet 6,1e3", "one,0.5", '"car, red",2', "unused,7"]))
    datasets = {"pets": PETS, "digits": ("one",), "cars": ("car, red",), "sketches": ()}
    stream = make_stream(section(order="frequency", chunks=10, table=str(path)), datasets)
    names = [
        label or dataset for task in stream.tasks for dataset, label in classes_of(task, datasets)
    ]  # ties are drawn
    assert names[0] == "one" and names[1] == "pet 5" and set(names[2:4]) == {"pet 4", "car, red"}
    assert names[4] == "pet 3" and set(names[5:7]) == {"pet 2", "sketches"} and names[-1] == "pet 6"


def test_time_is_chronological_and_mixes_what_is_of_one_period() -> None:
    found = order_of(order="time", dates=DATES)
    assert [DATES[dataset] for dataset, _ in found] == sorted(DATES[dataset] for dataset, _ in found)
    together = {
        tuple(dataset for dataset, _ in order_of(order="time", dates=DATES, seed=s)) for s in range(6)
    }
    assert len(together) > 1, "the retrieval set moves among the cars"
    assert period("2011-06-30") == (2011, 6, 30) and period(476) == (476,) and period("2011-06") == (2011, 6)


# --- names ----------------------------------------------------------------------------------------------------------------------


def test_equal_tasks_of_different_streams_have_equal_names() -> None:
    forward = make_stream(section(order="random", chunks=5), DATASETS)
    backward = make_stream(section(order="random", chunks=5, reverse=True), DATASETS)
    assert backward.tasks == forward.tasks[::-1]
    assert make_stream(section(chunks=1, tasks=("cars",)), DATASETS).tasks == (
        StreamTask("cars", (Part("cars"),)),
    )


def test_different_tasks_have_different_names() -> None:
    names: dict[str, Any] = {}
    for seed in range(30):
        for task in make_stream(section(order="random", chunks=5, seed=seed), DATASETS).tasks:
            assert names.setdefault(task.name, task.parts) == task.parts
    shorter = make_stream(section(chunks=2, tasks=("pets",)), DATASETS)
    longer = make_stream(section(chunks=2, tasks=("pets",)), {"pets": (*PETS, "pet 7")})
    assert shorter.tasks[0].name.startswith("pets-4of7-") and longer.tasks[0].name.startswith("pets-4of8-")


# --- files ----------------------------------------------------------------------------------------------------------------------


def test_saved_stream_loads_the_same(tmp_path: Path) -> None:
    stream = make_stream(section(order="random", chunks=5, seed=2), DATASETS)
    save(stream, tmp_path / "deep" / "s.json")
    loaded = load(tmp_path / "deep" / "s.json")
    assert loaded == stream and loaded.fingerprint == stream.fingerprint
    assert loaded.made == {"order": "random", "chunks": 5, "seed": 2, "reverse": False}
    assert make_stream(section(file=str(tmp_path / "deep" / "s.json")), DATASETS) == stream
    save(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "deep" / "s.json").read_bytes()


def test_fingerprint_is_of_the_content_and_stays() -> None:
    stream = make_stream(section(order="random", chunks=5, seed=2), DATASETS)
    assert Stream(stream.tasks).fingerprint == stream.fingerprint
    assert Stream(stream.tasks[::-1]).fingerprint != stream.fingerprint
    golden = Stream((StreamTask("a", (Part("x", ("é", "k")), Part("y"))),))
    assert golden.fingerprint == "5b87e38b73e8beb9ec9f1276c871d952325b2478ae875f9af38a79cd74b4ec0f"


def body(*tasks: tuple[str, Sequence[Any]], **more: Any) -> dict[str, Any]:
    listed = [
        {"name": name, "parts": [{"dataset": dataset, "classes": classes} for dataset, classes in parts]}
        for name, parts in tasks
    ]
    return {"format": 1, "tasks": listed, **more}


GOOD = ("a", [("cars", ["car 1"])])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[", "no valid JSON"),
        ('{"format": 1, "format": 1}', "a key is given twice"),
        ("[]", "must be a mapping"),
        (body(GOOD) | {"format": 2}, "format"),
        (body(), "tasks"),
        (body(GOOD, colour="red"), "colour: unknown key"),
        (body(("a/b", [("cars", None)])), "tasks[0].name: 'a/b' is not a plain name"),
        (body(("a", [("../cars", None)])), "tasks[0].parts[0].dataset: '../cars' is not a plain name"),
        (body(("a", [])), "tasks[0].parts"),
        (body(("a", [("cars", [])])), "tasks[0].parts[0].classes"),
        (body(("a", [("cars", [""])])), "tasks[0].parts[0].classes[0]"),
        (body(("a", [("cars", [1])])), "tasks[0].parts[0].classes[0]"),
        (body(GOOD, ("a", [("pets", None)])), "two tasks are called 'a'"),
        (body(GOOD, ("b", [("cars", ["car 2", "car 1"])])), "cars+++car 1 arrives a second time"),
        (body(GOOD, ("b", [("cars", None)])), "dataset cars is also there as a whole"),
        (body(("b", [("cars", None)]), GOOD), "dataset cars is also there as a whole"),
        (body(("b", [("cars", None)]), ("c", [("cars", None)])), "dataset cars is also there as a whole"),
    ],
)  # fmt: skip
def test_malformed_file_is_refused_naming_what_and_where(
    content: Any, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert complaint in str(caught.value) and str(path) in str(caught.value)


def test_missing_file_and_file_of_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.json")
    path = tmp_path / "s.json"
    path.write_text(json.dumps(body(("a", [("car", None), ("pets", ["pet 1", "pet x"])]))))
    with pytest.raises(ConfigError) as caught:
        make_stream(section(file=str(path)), DATASETS)
    assert "'car' is no adaptation dataset; did you mean cars?" in caught.value.problems[0]
    assert "task a: dataset pets has no class 'pet x'; did you mean pet" in caught.value.problems[1]


# --- mistakes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"order": "random"}, "give chunks"),
        ({"order": "frequency", "chunks": 2}, "needs table"),
        ({"table": "t.csv"}, "remove it"),
        ({"order": "random", "chunks": 2, "dates": {"a": 2000}}, "dates bears on order: time only"),
        ({"order": "similarity", "chunks": 2, "seed": 1}, "draws nothing"),
        ({"seed": 1}, "draws nothing"),
        ({"file": "s.json", "chunks": 2, "reverse": True}, "remove chunks, reverse, or remove file"),
        ({"file": "s.json", "order": "random"}, "remove order, or"),
        ({"order": "time", "chunks": 2, "dates": {"a": 2000, "b": "2000-05"}}, "write all of them alike"),
        ({"order": "time", "chunks": 2, "dates": {"a": "May 2000"}}, "'May 2000' is no year"),
        ({"order": "time", "chunks": 2, "dates": {"a": "2001-02-30"}}, "'2001-02-30' is no year"),
        ({"order": "time", "chunks": 2, "dates": {"a": True}}, "dates.a"),
        ({"chunks": 0}, "chunks"),
        ({"order": "randm"}, "did you mean random?"),
    ],
)
def test_section_that_makes_no_sense_is_refused(keys: dict[str, Any], complaint: str) -> None:
    made, problems = validate(StreamSection, keys, "stream")
    assert made is None
    assert complaint in " ".join(f"{problem.key}: {problem.text}" for problem in problems)


def test_section_of_every_order_survives_its_own_dump(table: str) -> None:
    for order in ORDERS:
        made = section(chunks=2, **keys_of(order, table))
        again, problems = validate(StreamSection, made.model_dump(mode="json"))
        assert again == made and not problems
    made = section(file="s.json")
    assert validate(StreamSection, made.model_dump(mode="json")) == (made, [])
    assert section().measured is made.measured is False
    assert section(order="performance", chunks=2).measured


@pytest.mark.parametrize(
    ("keys", "measured", "complaint"),
    [
        ({"tasks": ("car",)}, None, r"stream.tasks: 'car' .* did you mean cars\?"),
        ({"chunks": 16}, None, "stream.chunks: 16 tasks cannot be cut from 15 classes"),
        ({"order": "time", "chunks": 2, "dates": {"cars": 1}}, None, "no date for digits, pets, sketches"),
        ({"order": "performance", "chunks": 2}, None, r"which cars\+\+\+car 0, .* and 10 more lack"),
        ({"order": "similarity", "chunks": 2}, {e: float("nan") for e in ELEMENTS}, "not finite"),
    ],
)
def test_stream_that_cannot_be_made_says_what_to_do(keys: Any, measured: Any, complaint: str) -> None:
    with pytest.raises((ConfigError, PlanError), match=complaint):
        make_stream(section(**keys), DATASETS, measured)


def test_class_named_twice_cannot_be_cut_but_can_be_taken_whole() -> None:
    datasets = {"imagenet": ("crane", "sunglasses", "sunglasses")}
    assert len(make_stream(section(), datasets).tasks) == 1
    with pytest.raises(PlanError, match="two classes named 'sunglasses'"):
        make_stream(section(chunks=2), datasets)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("c.csv", "a,1\na,2\n", "names 'a' twice"),
        ("c.csv", "a,1\nb,2,3\n", "row 2: 3 columns"),
        ("c.csv", "a,1\nb,many\n", "the count of 'b' is \"many\""),
        ("c.csv", "a,-1\n", "from 0 on"),
        ("c.json", '{"a": 1, "a": 2}', "names 'a' twice"),
        ("c.json", '{"a": NaN}', "from 0 on"),
        ("c.json", '{"a": {"b": 1}}', "from 0 on"),
        ("c.json", '[["a", 1]]', "one mapping"),
        ("c.json", "{", "not valid JSON"),
        ("c.yaml", "a: 1\na: 2", "given twice"),
        ("c.yaml", "- a", "one mapping"),
        ("c.yaml", "a: true", "from 0 on"),
        ("c.txt", "a,1", "no known kind"),
        ("c.csv", b"\xff", "not UTF-8"),
    ],
)
def test_table_is_read_strictly(name: str, content: str | bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=r"stream\.table") as caught:
        read_counts(path)
    assert complaint in str(caught.value)


def test_table_without_a_class_names_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("zero: 1\none: 2")
    with pytest.raises(ConfigError, match=r"no count for digits\+\+\+two; add a row"):
        make_stream(section(order="frequency", chunks=1, tasks=("digits",), table=str(path)), DATASETS)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_counts(tmp_path / "none.csv")
