"""The source of a base: one rule of preprocessing and activation; no code that comes with a model is run."""

import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from merge_service.errors import UserError
from tests.workers.model_helpers import MODEL_CFG, PREPROCESS_CFG, Toys, sha256
from workers.models.base import MAX_LOGIT_SCALE, check_temperature, find
from workers.models.configuration import ModelError
from workers.models.model import export_base, load, save, tokenizer

ZERO = {"mean": [0, 0, 0], "std": [1, 1, 1]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that replaces the Hub: `hub/owner/name/FILE`."""
    home = tmp_path / "hub"

    def download(repository: str, name: str, **_: Any) -> str:
        if not (home / repository / name).is_file():
            raise FileNotFoundError(f"{repository} has no {name}")
        return str(home / repository / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return home


def weights_of(toys: Toys, place: Path, model_cfg: dict[str, Any], preprocess: dict[str, Any] | None) -> Path:
    place.mkdir(parents=True)
    shutil.copyfile(toys.base / WEIGHTS_FILE, place / WEIGHTS_FILE)
    raw = {"model_cfg": model_cfg} | ({} if preprocess is None else {"preprocess_cfg": preprocess})
    (place / CONFIG_FILE).write_text(json.dumps(raw))
    return place


def exported(config: str, pretrained: str | None, out: Path, stated: Any = None) -> dict[str, Any]:
    made = export_base(config, pretrained, out, preprocess=stated)
    found = json.loads((out / CONFIG_FILE).read_text())
    assert made["preprocess"]["mean"] == found["preprocess_cfg"]["mean"]
    return {**found, "made": made}


@pytest.mark.parametrize("form", ["directory", "file", "config", "hub"])
def test_same_weights_are_prepared_alike_however_they_are_named(
    toys: Toys, tmp_path: Path, hub: Path, form: str
) -> None:
    home = weights_of(toys, hub / "me" / "clip", MODEL_CFG, PREPROCESS_CFG | ZERO)
    plain = toys.root / "config" / CONFIG_FILE  # states another mean
    config, pretrained = {
        "directory": (str(plain), str(home)),
        "file": (str(plain), str(home / WEIGHTS_FILE)),
        "config": (str(home), None),
        "hub": (str(plain), "hf-hub:me/clip"),
    }[form]
    found = exported(config, pretrained, tmp_path / "out")
    assert found["preprocess_cfg"]["mean"] == [0, 0, 0] and found["preprocess_cfg"]["std"] == [1, 1, 1]
    assert found["preprocess_cfg"]["interpolation"] == "bilinear"
    assert sha256(tmp_path / "out") == sha256(toys.base)


def test_file_whose_configuration_beside_it_has_another_activation_is_refused(
    toys: Toys, tmp_path: Path
) -> None:
    home = weights_of(toys, tmp_path / "quick", MODEL_CFG | {"quick_gelu": True}, PREPROCESS_CFG)
    with pytest.raises(ModelError, match=r"open_clip_config\.json are different networks.*quick_gelu"):
        export_base(str(toys.root / "config" / CONFIG_FILE), str(home / WEIGHTS_FILE), tmp_path / "out")


def test_what_the_study_states_comes_first_and_is_said(toys: Toys, tmp_path: Path) -> None:
    found = exported(str(toys.base), None, tmp_path / "out", ZERO)
    assert found["preprocess_cfg"]["mean"] == [0, 0, 0]
    assert found["preprocess_cfg"]["interpolation"] == "bilinear"  # what is not stated stays
    assert found["made"]["preprocess_from"].startswith("model.preprocess (mean, std), the rest from")
    assert any("otherwise it would be mean 0.4, 0.5, 0.6" in note for note in found["made"]["notes"])


@pytest.mark.parametrize(
    ("name", "mean", "resize_mode", "whose"),
    [
        ("MobileCLIP-S1", [0, 0, 0], "shortest", "all known tags of MobileCLIP-S1"),
        ("ViT-B-16-SigLIP", [0.5, 0.5, 0.5], "squash", "all known tags of ViT-B-16-SigLIP"),
        ("ViT-L-14-CLIPA", [0.485, 0.456, 0.406], "squash", "all known tags of ViT-L-14-CLIPA"),
        ("ViT-B-16", [0.48145466, 0.4578275, 0.40821073], "shortest", "all known tags of ViT-B-16"),
        ("ViT-L-14", [0.48145466, 0.4578275, 0.40821073], "shortest", "open_clip's default (OpenAI's)"),
        ("ViT-S-32", [0.48145466, 0.4578275, 0.40821073], "shortest", "open_clip's default (OpenAI's)"),
    ],
)
def test_weights_of_ones_own_under_a_known_name_take_what_its_tags_agree_on(
    tmp_path: Path, name: str, mean: list[float], resize_mode: str, whose: str
) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"")
    base = find(name, str(tmp_path / "mine.safetensors"))
    assert (base.preprocess["mean"], base.preprocess["resize_mode"]) == (mean, resize_mode)
    assert base.preprocess_from == whose
    unknown = whose.startswith("open_clip")
    assert unknown == any("nothing says what the weights were trained with" in note for note in base.notes)
    assert base.usual == (mean[0] > 0.48 and resize_mode == "shortest" and mean[0] < 0.485)


def test_preprocessing_that_no_known_tag_has_is_said(toys: Toys, tmp_path: Path) -> None:
    model_cfg = json.loads(json.dumps(find("MobileCLIP-S1").model_cfg))
    home = weights_of(toys, tmp_path / "mine", model_cfg, {"mean": [0.5] * 3, "std": [0.5] * 3})
    (note,) = find(str(home)).notes
    assert "no known tag of MobileCLIP-S1 was trained so" in note and "mean 0, 0, 0" in note
    assert find(str(home), None, {**ZERO, "interpolation": "bilinear"}).notes[0].endswith("shortest")


def test_activation_that_some_tags_do_not_share_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"")
    (note,) = find("ViT-B-32", str(tmp_path / "mine.safetensors")).notes
    assert "activation gelu" in note and "openai" in note
    assert find("ViT-B-32", "laion2b_s34b_b79k").notes == ()


@pytest.mark.parametrize(
    ("config", "pretrained", "says"),
    [
        ("ViT-B-33", None, "did you mean ViT-B-32"),
        ("ViT-B-32", "laion2b", "did you mean laion2b_"),
        ("ViT-B-32", "openai", "Use ViT-B-32-quickgelu"),
        ("ViT-B/32", "openai", "Use ViT-B/32-quickgelu"),
        ("ViT-S-32", "laion2b", "has no pretrained tags"),
    ],
)
def test_name_or_tag_that_is_none_is_refused_before_anything_is_loaded(
    config: str, pretrained: str | None, says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        find(config, pretrained)


def test_temperature_that_neither_loss_knows_is_refused() -> None:
    check_temperature(MAX_LOGIT_SCALE + 1e-3, "rounded")
    with pytest.raises(ModelError, match="no logit_bias"):
        check_temperature(MAX_LOGIT_SCALE + 0.2, "a model")


# ------------------------------------------------------------------------------------------ nothing is run


class Canary:
    """An object that writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.place,)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "pytorch_model.bin", "model.pt"])
def test_pickled_weights_of_a_repository_are_refused_unread(tmp_path: Path, hub: Path, name: str) -> None:
    home = hub / "evil" / "clip"
    home.mkdir(parents=True)
    (home / CONFIG_FILE).write_text(json.dumps({"model_cfg": MODEL_CFG}))
    (home / name).write_bytes(pickle.dumps(Canary(tmp_path / "CANARY")))
    for place in ("hf-hub:evil/clip", str(home)):
        with pytest.raises(UserError, match=r"safetensors"):
            export_base(place, None, tmp_path / "out")
    assert not (tmp_path / "CANARY").exists()


def planted(place: Path, canary: Path) -> None:
    """A tokenizer and a text tower that request code of their own."""
    place.mkdir(parents=True)
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    (place / "evil.py").write_text(
        code
        + "from transformers import BertTokenizer as Evil, BertModel as EvilModel, BertConfig as EvilConfig\n"
    )
    (place / "vocab.txt").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\na\n")
    maps = {
        "AutoTokenizer": ["evil.Evil", None],
        "AutoConfig": "evil.EvilConfig",
        "AutoModel": "evil.EvilModel",
    }
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": maps}))
    (place / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": maps}))


@pytest.mark.parametrize(
    "text",
    [
        {"hf_tokenizer_name": "{home}"},
        {"hf_tokenizer_name": "{home}", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"hf_tokenizer_name": "x", "hf_model_name": "{home}"},
        {"hf_model_name": "{home}", "hf_model_pretrained": True},
    ],
    ids=["tokenizer", "trusted tokenizer", "text tower", "pretrained text tower"],
)
@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_that_comes_with_a_model_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: dict[str, Any], answer: str
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    home, canary = tmp_path / "evil", tmp_path / "CANARY"
    planted(home, canary)
    named = {key: value.format(home=home) if isinstance(value, str) else value for key, value in text.items()}
    raw = {"model_cfg": MODEL_CFG | {"text_cfg": MODEL_CFG["text_cfg"] | named}}
    (home / CONFIG_FILE).write_text(json.dumps(raw))
    with pytest.raises(UserError):
        export_base(str(home / CONFIG_FILE), None, tmp_path / "out")
    assert not canary.exists()


def test_directory_with_its_own_tokenizer_needs_no_network(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    home, words = tmp_path / "mine", ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing"]
    text_cfg = MODEL_CFG["text_cfg"] | {"hf_tokenizer_name": "nobody/has-this"}
    weights_of(toys, home, MODEL_CFG | {"text_cfg": text_cfg}, PREPROCESS_CFG)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(str(home))
    (home / "tokenization_evil.py").write_text("raise SystemExit")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    export_base(str(home), None, tmp_path / "out")
    found = tokenizer(tmp_path / "out")(["a red thing", "a"])
    assert found.tolist() == [[2, 5, 6, 7, 3, 1, 1, 1], [2, 5, 3, 1, 1, 1, 1, 1]]
    save(load(tmp_path / "out"), tmp_path / "out", tmp_path / "expert")
    assert torch.equal(tokenizer(tmp_path / "expert")(["a red thing", "a"]), found)
    assert not list((tmp_path / "expert").glob("*.py"))
    assert set(load_file(tmp_path / "expert" / WEIGHTS_FILE)) == set(load_file(toys.base / WEIGHTS_FILE))


def test_tag_that_is_published_as_a_pickle_alone_is_refused(tmp_path: Path, hub: Path) -> None:
    with pytest.raises(
        UserError, match=r"none of .*\.safetensors.*Pickled weights \(\.bin, \.pt\) are not read"
    ):
        export_base("ViTamin-S", "datacomp1b", tmp_path / "out")


def test_openais_own_writing_of_a_name_has_the_same_tags() -> None:
    slash, dash = (find(name, "laion2b_s34b_b79k") for name in ("ViT-B/32", "ViT-B-32"))
    assert slash.configuration == dash.configuration
    assert find("ViT-B/32-quickgelu", "openai").activation == "quick_gelu"
