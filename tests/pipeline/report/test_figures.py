"""What must be visible in a figure: arrivals, arrows, hidden lines, the kind of a score, dark cells."""

import json
from typing import Any

from pipeline.report import figures as draw
from pipeline.report.data import HELD_OUT, TASKS
from tests.pipeline.report_toys import PAIRS, invented, toy


def answer(**more: Any) -> dict[str, Any]:
    return {**invented(toy({"strategies": ["zero_shot", "offline_merging", "best_in_time"]})), **more}


def test_heat_map_has_tasks_in_order_of_arrival_with_a_frame_and_held_out_sets_apart() -> None:
    data = draw.prepare([answer()])
    assert data.rows == (TASKS, "d1", "d2", "d3", HELD_OUT, "kept")
    frames = [
        layer
        for layer in draw.matrix(data).chart.to_dict()["layer"]
        if layer["mark"].get("stroke") == "black"
    ]
    assert [layer["transform"][-1] for layer in frames] == [{"filter": "datum.t == datum.arrival"}]
    rows = data.scores[data.scores["t"] == data.scores["arrival"]]
    assert set(zip(rows["dataset"], rows["t"])) == {("d1", 1), ("d2", 2), ("d3", 3)}


def test_scores_of_retrieval_sets_are_called_recall_and_others_accuracy() -> None:
    figure = draw.matrix(draw.prepare([answer(retrieval=["kept"])]))
    assert "kept (recall@5)" in draw.prepare([answer(retrieval=["kept"])]).rows
    assert "recall@5" in figure.reading and "recall@5 where named" in json.dumps(figure.chart.to_dict())
    assert "recall" not in json.dumps(draw.matrix(draw.prepare([answer()])).chart.to_dict())


def test_plane_shows_where_a_path_begins_whither_it_goes_and_where_it_ends() -> None:
    layers = draw.plane(draw.prepare([answer()])).chart.to_dict()["layer"]
    marks = [layer["mark"] for layer in layers]
    assert any("angle" in layer["encoding"] and layer["mark"]["shape"] == "triangle" for layer in layers)
    assert any(mark.get("shape") == "square" for mark in marks)
    assert any(mark["type"] == "point" and mark.get("filled") and mark["size"] == 130 for mark in marks)


def test_text_of_a_figure_names_lines_that_hide_each_other() -> None:
    told = answer()
    twin = {**told["trajectories"][1], "id": "twin", "group": "twin"}
    both = draw.prepare([{**told, "trajectories": [*told["trajectories"], twin]}])
    sentence = "one line hides the others: offline_merging and twin."
    assert sentence in draw.plane(both).reading and sentence in draw.over_time(both).reading
    assert "hides" not in draw.over_time(draw.prepare([told])).reading


def test_heat_maps_are_dark_where_there_is_much() -> None:
    """Sequential schemes run from light to dark; signed ones are light at zero, with blue for more."""
    data = draw.prepare([invented(toy({"strategies": ["offline_merging", "continual_finetuning"]}))])
    figures = [draw.matrix(data), draw.difference(data), draw.techniques(data), draw.similarity(PAIRS)]
    scales = [figure.chart.to_dict()["layer"][0]["encoding"]["color"]["scale"] for figure in figures]
    assert [scale["scheme"] for scale in scales] == ["blues", "blueorange", "blues", "blueorange"]
    assert all(scale.get("reverse", False) == (scale["scheme"] == "blueorange") for scale in scales)
