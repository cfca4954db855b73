"""A weights directory as an MLflow model: labels for pictures, and embeddings of pictures and texts.

A copy of this file (and of `pictures.py`) is stored with every logged model, so a model can be served without this project:
MLflow, open_clip, torch, pandas and Pillow are enough. Features are those of `scoring.evaluate`: pictures in their displayed
orientation, open_clip's preprocessing, fp32.

Invariant: nothing is unpickled; apart from `pictures`, nothing of this project is imported.
"""

import base64
import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pandas
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from PIL import Image

from workers.data.pictures import as_seen

WEIGHTS = "open_clip_model.safetensors"
PLACE = "{c}"
"""The place of the label in a template."""
BATCH = 64
DEFAULTS: Mapping[str, Any] = {"labels": [], "templates": [f"a photo of a {PLACE}."]}


class Unanswerable(MlflowException, ValueError):
    """An invalid input. It is an error of MLflow, since MLflow's server sends the text of its own errors to the client and reports any other
    error as unexpected."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)


def _load_pyfunc(directory: str) -> "ZeroShot":
    """The entry point of `mlflow.pyfunc.load_model`."""
    return ZeroShot(Path(directory))


class ZeroShot:
    """A CLIP-like model. Raises FileNotFoundError, with the reason from `manifest.json`, if the weights are not in `directory`."""

    def __init__(self, directory: Path) -> None:
        if not (directory / WEIGHTS).is_file():
            raise FileNotFoundError(_absent(directory))
        place = f"local-dir:{directory}"
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model, _, self._preprocess = open_clip.create_model_and_transforms(place, device=self._device)
        self._model.eval()
        self._tokenizer = open_clip.get_tokenizer(place)

    def predict(
        self, model_input: pandas.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pandas.DataFrame:
        """One row of answers for each row of `model_input`, which has a column `image` (encoded pictures) or `text`.

        With `params["labels"]` an image gets `label` (the likeliest), its `probability`, and the `probabilities` of all labels in their
        order. Without labels, an image or text gets a normalised `embedding`. `params["templates"]` are sentences with {c} for the
        label. Raises Unanswerable.
        """
        asked = {**DEFAULTS, **(params or {})}
        column = _column(model_input)
        labels = [str(label) for label in asked["labels"]]
        values = model_input[column].tolist()
        with torch.inference_mode():
            if not labels:
                found = self._images(values) if column == "image" else self._texts(values)
                return pandas.DataFrame({"embedding": found.tolist()}, index=model_input.index)
            if column != "image":
                raise Unanswerable(
                    "labels are for images, but the input has texts; leave labels out for embeddings"
                )
            likely = self._classified(values, labels, [str(one) for one in asked["templates"]])
        best = likely.argmax(dim=1) if len(values) else torch.zeros(0, dtype=torch.int64)
        return pandas.DataFrame(
            {
                "label": [labels[int(place)] for place in best],
                "probability": [float(row[place]) for row, place in zip(likely, best, strict=True)],
                "probabilities": likely.tolist(),
            },
            index=model_input.index,
        )

    def _classified(
        self, images: Sequence[bytes], labels: Sequence[str], templates: Sequence[str]
    ) -> torch.Tensor:
        """Probabilities float32 [images, labels]: the softmax over labels of the scaled cosines, as in the training of CLIP."""
        if len(set(labels)) < len(labels):
            raise Unanswerable("a label occurs twice; labels must be distinct")
        bad = [template for template in templates if PLACE not in template]
        if bad or not templates:
            raise Unanswerable(
                f"a template needs {PLACE} in place of the label; got {bad[0] if bad else 'none'!r}"
            )
        classes = torch.stack([self._class(label, templates) for label in labels])
        scale = self._model.logit_scale.exp().cpu()
        return (scale * self._images(images) @ classes.T).softmax(dim=1)

    def _class(self, label: str, templates: Sequence[str]) -> torch.Tensor:
        """The normalised mean of the text features of a label over templates, [d]."""
        mean = self._texts([template.replace(PLACE, label) for template in templates]).mean(dim=0)
        return mean / mean.norm()

    def _images(self, images: Sequence[bytes]) -> torch.Tensor:
        return self._encoded(
            images,
            lambda part: torch.stack([self._preprocess(_opened(image)) for image in part]),
            self._model.encode_image,
        )

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._encoded(texts, lambda part: self._tokenizer(list(part)), self._model.encode_text)

    def _encoded(
        self,
        values: Sequence[Any],
        read: Callable[[Sequence[Any]], torch.Tensor],
        encode: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Normalised features [values, d], float32 on the CPU."""
        parts = [
            encode(read(values[start : start + BATCH]).to(self._device), normalize=True).float().cpu()
            for start in range(0, len(values), BATCH)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, 1)


def _absent(directory: Path) -> str:
    """Why a model has no weights, and how to get them, from its manifest."""
    manifest = directory / "manifest.json"
    known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    gone = f"MLflow has no weights of this model: they were no longer in {known.get('store', 'the store')} of the study when it was logged"
    return str(known.get("weights") or gone)


def _column(model_input: pandas.DataFrame) -> str:
    there = [name for name in ("image", "text") if name in model_input.columns]
    if len(there) != 1:
        raise Unanswerable(
            f"the input needs one column, image (encoded pictures, as bytes) or text; it has {list(model_input.columns)}"
        )
    return there[0]


def _opened(picture: Any) -> Image.Image:
    """The picture of one value, as bytes or base64. MLflow's server decodes base64 in some forms of a request only, not in `inputs`,
    `instances` or CSV. Raises Unanswerable."""
    if isinstance(picture, str):
        picture = picture.encode(errors="replace")
    if not isinstance(picture, bytes | bytearray):
        raise Unanswerable(
            f"an image must be the bytes of a PNG, JPEG or WebP file, raw or in base64, not {type(picture).__name__}"
        )
    with contextlib.suppress(ValueError):  # the bytes of a picture file are not valid base64
        picture = base64.b64decode(picture, validate=True)
    try:
        with Image.open(io.BytesIO(picture)) as image:
            image.load()
            return as_seen(image)
    except OSError as error:
        raise Unanswerable(
            f"an image cannot be read: {error}; give the bytes of its file, raw or in base64, not its path"
        ) from None
