"""Logged and registered models as MLflow's users load them: loaded, called, and served over HTTP."""

import base64
import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from pipeline.tracking.mlflow import flavor
from pipeline.tracking.mlflow.local import LOCAL_ARTIFACTS, local_uri
from pipeline.tracking.mlflow.sink import MODEL_ID_TAG
from pipeline.tracking.tracker import sync
from tests.pipeline.tracked_study import EXPERIMENT, Tracked, deliver, finished_study
from tests.servers import serving

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs/models/tiny-clip"
LABELS = ["a red square", "a blue circle", "the letter A"]
TEMPLATES = ["a photo of {c}.", "{c}"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """A delivered study whose weights are a real model's."""
    out = tmp_path_factory.mktemp("pyfunc") / "before"
    study = finished_study(out, strategies=("best_in_time",), tasks=("animals",), weights=TINY)
    outbox = study.outbox()
    study.tell(outbox)
    assert deliver(study, outbox) is None
    outbox.close()
    return study


@pytest.fixture(autouse=True)
def _tracked_there(study: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local_uri(study.out))


@pytest.fixture(scope="module")
def model(study: Tracked) -> Any:
    import mlflow

    mlflow.set_tracking_uri(local_uri(study.out))
    loaded = mlflow.pyfunc.load_model("models:/demo@best")
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    return loaded


def picture(seed: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (40, 30, len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values if len(mode) > 1 else values[:, :, 0], mode).save(file, kind)
    return file.getvalue()


def frame(*pictures: bytes) -> pandas.DataFrame:
    return pandas.DataFrame({"image": list(pictures)})


def test_registered_model_classifies_as_the_study_scores(model: Any) -> None:
    """Probabilities are the softmax over the logits of the encoder that evaluations use, in the order of the labels."""
    import torch

    from workers.data.decode import GEOMETRY, evaluation_geometry, height_and_width
    from workers.data.pictures import as_seen
    from workers.feed.pixels import Pixels
    from workers.scoring.evaluate import Encoder

    pictures = [picture(1), picture(2, "RGBA"), picture(3, "L"), picture(4, kind="JPEG")]
    found = model.predict(frame(*pictures), params={"labels": LABELS, "templates": TEMPLATES})
    encoder = Encoder(TINY, "cpu", 8)
    geometry = {key: encoder.preprocess[key] for key in GEOMETRY if encoder.preprocess.get(key) is not None}
    shown = evaluation_geometry(height_and_width(encoder.preprocess["size"]), geometry)
    seen = np.stack([np.asarray(shown(as_seen(Image.open(io.BytesIO(one))))) for one in pictures])
    pixels = Pixels(encoder.preprocess, encoder.device)(torch.from_numpy(seen))
    with torch.inference_mode():
        features = encoder.model.encode_image(pixels, normalize=True)
        classes = encoder.classifier(LABELS, TEMPLATES)
        expected = (encoder.model.logit_scale.exp() * features @ classes).softmax(dim=1).numpy()
    np.testing.assert_allclose(np.array(found["probabilities"].tolist()), expected, atol=1e-5)
    assert found["label"].tolist() == [LABELS[place] for place in expected.argmax(axis=1)]
    np.testing.assert_allclose(found["probability"], expected.max(axis=1), atol=1e-5)


def test_without_labels_pictures_and_texts_have_embeddings_in_one_space(model: Any) -> None:
    images = np.array(model.predict(frame(picture(1), picture(2)))["embedding"].tolist())
    texts = np.array(model.predict(pandas.DataFrame({"text": ["a cat"]}))["embedding"].tolist())
    assert images.shape[0] == 2 and images.shape[1] == texts.shape[1]
    np.testing.assert_allclose(np.linalg.norm([*images, *texts], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "params", "says"),
    [
        (frame(b"no picture"), {"labels": LABELS}, "cannot be read"),
        (pandas.DataFrame({"image": ["cats/1.png"]}), {"labels": LABELS}, "not its path"),
        (frame(picture(1)), {"labels": ["a", "a"]}, "twice"),
        (frame(picture(1)), {"labels": ["a"], "templates": ["a photo"]}, r"needs \{c\}"),
        (frame(picture(1)).assign(text="a cat"), {}, "one column"),
        (pandas.DataFrame({"text": ["a cat"]}), {"labels": LABELS}, "labels are for images"),
    ],
    ids=[
        "no picture",
        "a path",
        "a label twice",
        "no place for the label",
        "image and text",
        "text with labels",
    ],
)
def test_input_that_cannot_be_answered_is_refused_with_the_reason(
    model: Any, data: pandas.DataFrame, params: dict[str, Any], says: str
) -> None:
    with pytest.raises(Exception, match=says):
        model.predict(data, params=params)


def test_model_describes_itself_and_its_example_works(model: Any) -> None:
    from mlflow.models import get_model_info

    info = get_model_info("models:/demo@best")
    assert [column.name for column in info.signature.inputs] == ["image", "text"]
    assert [param.name for param in info.signature.params] == ["labels", "templates"]
    assert info.metadata["temporal_merge"]["task"] == "animals" and info.model_id == model.metadata.model_id
    answer = model.predict(model.input_example, params={"labels": ["a red square"]})
    assert answer["label"].tolist() == ["a red square"]
    needed = model.metadata.get_model_info().flavors["python_function"]["env"]
    assert set(needed) == {"conda", "virtualenv"}


def test_nothing_of_a_model_is_pickled_and_its_code_needs_nothing_of_this_project(study: Tracked) -> None:
    """Loaded in a process that cannot import the project, from code stored with the model."""
    places = [path.parent for path in (study.out / LOCAL_ARTIFACTS).rglob("MLmodel")]
    assert len(places) == 3, "the base, the expert, and what is served"
    stored = (path for place in places for path in place.rglob("*") if path.is_file())
    suffixes = {path.suffix for path in stored if path.parent.name != "__pycache__"}  # made by loading it
    assert suffixes == {"", ".json", ".yaml", ".txt", ".py", ".safetensors"}
    code = (
        "import sys, importlib.abc\n"
        "class Away(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] in ('workers', 'pipeline', 'merge_service', 'cluster'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Away())\n"
        "import mlflow, pandas\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "print(len(model.predict(pandas.DataFrame({'text': ['a cat']}))['embedding'][0]))\n"
    )
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    answer = subprocess.run(
        [sys.executable, "-c", code, str(places[0])], cwd=study.out, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert answer.returncode == 0 and int(answer.stdout) > 8, answer.stderr[-2000:]


def test_experts_are_models_of_the_runs_that_trained_them_with_their_lineage(study: Tracked) -> None:
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient(local_uri(study.out))
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    models = {model.name: model for model in client.search_logged_models([experiment])}
    runs = {run.info.run_name: client.get_run(run.info.run_id) for run in client.search_runs([experiment])}
    names = {model.model_id: model.name for model in models.values()}
    expert, trajectory = runs["expert t=1 animals · init base"], runs["best_in_time"]
    assert models["expert-t1-animals-init_base"].source_run_id == expert.info.run_id
    assert [names[one.model_id] for one in expert.inputs.model_inputs] == ["base-demo"]
    assert [one.dataset.name for one in expert.inputs.dataset_inputs] == ["animals"]
    assert [names[one.model_id] for one in trajectory.inputs.model_inputs] == ["expert-t1-animals-init_base"]
    assert [names[one.model_id] for one in trajectory.outputs.model_outputs] == ["best_in_time-t1-animals"]
    loaded = mlflow.pyfunc.load_model(f"models:/{models['expert-t1-animals-init_base'].model_id}")
    assert not loaded.predict(pandas.DataFrame({"text": ["a cat"]})).empty


def test_version_leads_to_its_model_and_to_the_studys_own_run(study: Tracked) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(local_uri(study.out))
    version = client.get_model_version_by_alias("demo", "best")
    model_id = version.tags[MODEL_ID_TAG]
    assert version.source == f"models:/{model_id}"
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (parent,) = client.search_runs([experiment], "tags.kind = 'study'")
    assert [output.model_id for output in parent.outputs.model_outputs] == [model_id]
    assert parent.data.metrics["gm"] == client.get_run(version.run_id).data.metrics["gm"]


def test_models_of_other_releases_of_the_loader_load_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python caches modules by name: with equal names, both models would use the first loader."""
    ours = flavor._loader.__wrapped__()[0]
    monkeypatch.setitem(flavor.SOURCES, "pictures.py", "data/zero_shot.py")
    assert flavor._loader.__wrapped__()[0] != ours


def test_model_that_was_logged_without_weights_says_where_they_are_and_loads_once_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    study = finished_study(
        tmp_path / "out", strategies=("best_in_time",), tasks=("animals",), weights=TINY, log_weights=False
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local_uri(study.out))

    def told(log_weights: bool) -> None:
        outbox = study.outbox()
        replace(study, facts=replace(study.facts, log_weights=log_weights)).tell(outbox)
        assert deliver(study, outbox) is None
        outbox.close()

    told(False)
    with pytest.raises(FileNotFoundError, match=r"tracking\.log_weights: false") as caught:
        mlflow.pyfunc.load_model("models:/demo@best")
    trajectory = study.plan.trajectories[-1].id
    assert f"`temporal-merge export OUT --trajectory {trajectory} --t 1 --out DIR`" in str(caught.value)
    assert "--set tracking.log_weights=true" in str(caught.value)

    told(True)
    loaded = mlflow.pyfunc.load_model("models:/demo@best")
    assert loaded.predict(frame(picture(1)), params={"labels": LABELS})["label"][0] in LABELS
    told(False)
    mlflow.pyfunc.load_model("models:/demo@best")  # what MLflow has stays


def test_requirements_are_releases_that_an_index_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavor, "_version", lambda name: None if name == "pandas" else "2.14.1+cpu")
    found = flavor._requirements(hugging_face=True)
    assert "torch==2.14.1" in found and "transformers==2.14.1" in found and "pandas" not in str(found)


def test_study_that_was_moved_loads_after_sync(study: Tracked, tmp_path: Path) -> None:
    import mlflow

    moved = tmp_path / "after"
    study.out.rename(moved)
    try:
        assert sync(moved) == (0, None)
        mlflow.set_tracking_uri(local_uri(moved))
        loaded = mlflow.pyfunc.load_model("models:/demo@best")
        assert not loaded.predict(pandas.DataFrame({"text": ["a cat"]})).empty
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        moved.rename(study.out)
        sync(study.out)


@pytest.fixture(scope="module")
def server(study: Tracked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow models serve` of the best model: the address that it answers on."""
    home = tmp_path_factory.mktemp("serve")

    def command(port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/demo@best"),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        ]

    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # mlflow starts uvicorn by name
        "MLFLOW_TRACKING_URI": local_uri(study.out),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with serving(command, home, environment) as port:
        yield f"http://127.0.0.1:{port}/invocations"


def ask(server: str, body: Any, kind: str = "application/json") -> Any:
    data = body if isinstance(body, str) else json.dumps(body)
    request = urllib.request.Request(server, data.encode(), {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]


@pytest.mark.slow
def test_served_model_classifies_a_picture_over_http(server: str, model: Any) -> None:
    seen = picture(5)
    data = {"columns": ["image"], "data": [[base64.b64encode(seen).decode()]]}
    params = {"labels": LABELS}
    (found,) = ask(server, {"dataframe_split": data, "params": params})
    expected = model.predict(frame(seen), params=params).to_dict("records")[0]
    assert found["label"] == expected["label"]
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    encoded = data["data"][0][0]
    forms: list[dict[str, Any]] = [
        {"dataframe_records": [{"image": encoded}]},
        {"inputs": {"image": [encoded]}},
        {"instances": [{"image": encoded}]},
    ]
    for form in forms:
        assert ask(server, {**form, "params": params})[0]["label"] == found["label"], form
    (in_csv,) = ask(server, f"image\n{encoded}\n", "text/csv")  # a table has no params
    (in_json,) = ask(server, {"dataframe_split": data})
    assert in_csv["embedding"] == pytest.approx(in_json["embedding"], abs=1e-5)
    (embedded,) = ask(server, {"dataframe_split": {"columns": ["text"], "data": [["a cat"]]}})
    assert len(embedded["embedding"]) > 8
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, {"dataframe_split": data, "params": {"labels": ["a", "a"]}})
    assert refused.value.code == 400 and "twice" in json.load(refused.value)["message"]
