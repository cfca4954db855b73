"""The files that make a weights directory a model that MLflow loads and serves: MLmodel, environment, signature, example, loader.

The loader is code stored with the model, in a package whose name contains its digest, so models of different releases load in one
process.

Invariant: pure text, the same for the same model; nothing is pickled, and neither MLflow nor torch is imported.
"""

import base64
import hashlib
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE

MLMODEL, CODE = "MLmodel", "code"
ROOM = Path(__file__).parents[3] / "workers"
SOURCES = {"__init__.py": "models/zero_shot.py", "pictures.py": "data/pictures.py"}
REQUIRED = ("mlflow", "open_clip_torch", "torch", "torchvision", "numpy", "pandas", "Pillow", "safetensors")
OF_HUGGING_FACE = "transformers"
"""Required in addition if a tower or tokenizer in the configuration is one of Hugging Face's."""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAGElEQVR42mP4jwMwEJA4IScHR7SSIMFVAG/Kn7Gv69HoAAAAAElFTkSuQmCC"
LABELS = ["a red square", "a blue circle"]


def _array(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "type": "array", "items": {"type": kind}, "required": False}


_SIGNATURE = {
    "inputs": [
        {"name": "image", "type": "binary", "required": False},
        {"name": "text", "type": "string", "required": False},
    ],
    "outputs": [
        {"name": "label", "type": "string", "required": False},
        {"name": "probability", "type": "double", "required": False},
        _array("probabilities", "double"),
        _array("embedding", "double"),
    ],
    "params": [
        {"name": "labels", "type": "string", "default": [], "shape": [-1]},
        {"name": "templates", "type": "string", "default": ["a photo of a {c}."], "shape": [-1]},
    ],
}
_EXAMPLE = {
    "artifact_path": "input_example.json",
    "serving_input_path": "serving_input_example.json",
    "pandas_orient": "split",
    "type": "dataframe",
    "params": "true",
}  # fmt: skip


@cache
def shared_files(hugging_face: bool) -> dict[str, str]:
    """Name -> text of the files that are the same for every model: all but MLmodel. `hugging_face`: see `needs_hugging_face`."""
    requirements = _requirements(hugging_face)
    frame = {"columns": ["image"], "data": [[PNG]]}
    pip = f"pip<={_version('pip')}" if _version("pip") else "pip"
    conda = {
        "channels": ["conda-forge"],
        "dependencies": [f"python={platform.python_version()}", pip, {"pip": requirements}],
        "name": "mlflow-env",
    }
    return {
        "requirements.txt": "\n".join(requirements) + "\n",
        "conda.yaml": _json(conda),
        "python_env.yaml": _json(
            {"python": platform.python_version(), "build_dependencies": [pip], "dependencies": ["-r requirements.txt"]}
        ),
        "input_example.json": _json({"inputs": frame, "params": {"labels": LABELS}}),
        "serving_input_example.json": _json({"dataframe_split": frame, "params": {"labels": LABELS}}),
        **{f"{CODE}/{_loader()[0]}/{name}": text for name, text in _loader()[1].items()},
    }  # fmt: skip


def mlmodel(
    model: Mapping[str, str], manifest: Mapping[str, Any], created_ms: int, is_whole: bool = True
) -> str:
    """MLmodel of one model; `model` is {"model_id", "run_id", "artifact_path"}; `is_whole`: its weights are there. JSON is YAML."""
    when = datetime.fromtimestamp(created_ms / 1000, UTC)
    flavor = {
        "loader_module": _loader()[0],
        "code": CODE,
        "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        "python_version": platform.python_version(),
    }
    opened = {"data": ".", "weights": WEIGHTS_FILE, "open_clip_version": _version("open_clip_torch")}
    described = {key: manifest[key] for key in ("study", "t", "task", "fingerprint") if key in manifest}
    size = {"model_size_bytes": sum(one["bytes"] for one in manifest["files"].values())}
    body = {
        **model,
        "model_uuid": manifest["fingerprint"][:32],
        **(size if is_whole else {}),
        "mlflow_version": _version("mlflow"),
        "utc_time_created": when.strftime("%Y-%m-%d %H:%M:%S.%f"),
        "flavors": {"python_function": flavor, **({"open_clip": opened} if is_whole else {})},
        "signature": {key: json.dumps(value) for key, value in _SIGNATURE.items()},
        "saved_input_example_info": _EXAMPLE,
        "metadata": {"temporal_merge": described},
    }  # fmt: skip
    return _json(body)


@cache
def _loader() -> tuple[str, dict[str, str]]:
    """The name of the loader's package and its files, whose imports refer to each other."""
    texts = {name: (ROOM / place).read_text(encoding="utf-8") for name, place in SOURCES.items()}
    package = f"temporal_merge_model_{hashlib.sha256(_json(texts).encode()).hexdigest()[:12]}"
    return package, {
        name: text.replace("from workers.data.pictures import", f"from {package}.pictures import")
        for name, text in texts.items()
    }


def needs_hugging_face(weights: Path) -> bool:
    """Whether a tower or the tokenizer of a weights directory is one of Hugging Face's."""
    return '"hf_' in (weights / CONFIG_FILE).read_text(encoding="utf-8")


def _requirements(hugging_face: bool) -> list[str]:
    """The packages that loading needs, in the installed releases, without local labels (`2.14.1+cpu`), which no index has."""
    names = (*REQUIRED, OF_HUGGING_FACE) if hugging_face else REQUIRED
    found = {name: _version(name) for name in names}
    return [f"{name}=={release.partition('+')[0]}" for name, release in found.items() if release]


@cache
def _version(name: str) -> str | None:
    """The release of an installed package, else None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def example_picture() -> bytes:
    """The picture of the input example, a PNG."""
    return base64.b64decode(PNG)
