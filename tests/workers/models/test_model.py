"""Weights directories: from any source, plain open_clip opens them, and mistakes are named."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_service.anatomy import modality
from merge_service.checkpoints import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, CheckpointWriter
from merge_service.errors import CorruptCheckpoint, IncompatibleCheckpoint, UserError
from merge_service.merge import merge
from tests.workers.model_helpers import MODEL_CFG, PREPROCESS_CFG, Toys, sha256, write_config
from workers.models.model import (
    _without_values,
    export_base,
    load,
    preprocess_cfg,
    save,
    set_trainable,
    tokenizer,
)
from workers.models.weights import load_strictly, tied, write_weights


def test_weights_directory_opens_in_plain_open_clip_as_the_same_model(toys: Toys) -> None:
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{toys.base}")
    ours = load(toys.base)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()))
    assert torch.equal(theirs.attn_mask, ours.attn_mask) and not ours.training
    assert list(preprocess.transforms[-1].mean) == preprocess_cfg(toys.base)["mean"] == PREPROCESS_CFG["mean"]
    assert preprocess_cfg(toys.base)["size"] == 32 and preprocess_cfg(toys.base)["resize_mode"] == "shortest"


def test_random_base_is_decided_by_its_seed_and_says_so(toys: Toys, tmp_path: Path) -> None:
    config = str(toys.root / "config" / CONFIG_FILE)
    torch.manual_seed(99)
    again = export_base(config, None, tmp_path / "again", seed=1)
    export_base(config, None, tmp_path / "other", seed=2)
    assert sha256(tmp_path / "again") == sha256(toys.base) != sha256(tmp_path / "other")
    assert again["random"] and "seed 1" in again["source"] and again["parameters"] > 1_000_000


@pytest.mark.parametrize(
    "form",
    ["directory", "local-dir", "file", "config itself", "name", "shards", "other file name", "wrapped"],
)
def test_every_way_to_name_weights_gives_the_same_bytes(
    toys: Toys, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "configs" / "models" / "our-toy")
    mine = write_config(tmp_path / "mine").parent
    if form == "shards":
        with Checkpoint.open(toys.base) as whole:
            limit = sum(info.nbytes for info in whole.tensors.values()) // 2
        merge("average", {}, None, [toys.base], mine / "model.safetensors", shard_bytes=limit)
    elif form == "other file name":
        (mine / "model.safetensors").write_bytes((toys.base / WEIGHTS_FILE).read_bytes())
    elif form == "wrapped":
        tensors = load_file(toys.base / WEIGHTS_FILE)
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        tensors["text.embeddings.position_ids"] = torch.arange(8).reshape(1, 8)
        save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, mine / WEIGHTS_FILE)
    config, pretrained = {
        **dict.fromkeys(("shards", "other file name", "wrapped"), (str(mine), None)),
        "directory": (str(toys.root / "config" / CONFIG_FILE), str(toys.base)),
        "local-dir": (str(toys.root / "config" / CONFIG_FILE), f"local-dir:{toys.base}"),
        "file": (str(toys.root / "config" / CONFIG_FILE), str(toys.base / WEIGHTS_FILE)),
        "config itself": (f"local-dir:{toys.base}", None),
        "name": ("our-toy", str(toys.base)),
    }[form]
    made = export_base(config, pretrained, tmp_path / "made")
    assert not made["random"] and sha256(tmp_path / "made") == sha256(toys.base)
    assert json.loads((tmp_path / "made" / CONFIG_FILE).read_text())["preprocess_cfg"]["mean"] == [
        0.4,
        0.5,
        0.6,
    ]


def test_weights_stored_in_half_precision_open_as_fp32(toys: Toys, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(toys.base / WEIGHTS_FILE).items()}
    write_config(tmp_path / "half")
    save_file(half, tmp_path / "half" / WEIGHTS_FILE)
    export_base(str(tmp_path / "half"), None, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / WEIGHTS_FILE)
    assert all(torch.equal(whole[name], half[name].float()) for name in half)


def broken(toys: Toys, tmp_path: Path, **changes: Any) -> Path:
    """The toy base with some tensors replaced (None: left out)."""
    tensors = load_file(toys.base / WEIGHTS_FILE)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    write_config(tmp_path / "broken")
    save_file(tensors, tmp_path / "broken" / WEIGHTS_FILE)
    return tmp_path / "broken"


@pytest.mark.fault("F18")
def test_weights_that_do_not_fit_list_what_differs(toys: Toys, tmp_path: Path) -> None:
    directory = broken(
        toys, tmp_path, logit_scale=None, text_projection=torch.zeros(3, 4), extra=torch.zeros(1)
    )
    with pytest.raises(IncompatibleCheckpoint) as caught:
        load(directory)
    assert "logit_scale is missing" in str(caught.value) and "extra is not in the model" in str(caught.value)
    assert "text_projection has shape [3, 4], the model wants [32, 16]" in str(caught.value)


def test_bias_that_the_configuration_lacks_is_named_with_the_key(toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleCheckpoint, match=r"logit_bias is not in the model.*init_logit_bias"):
        load(broken(toys, tmp_path, logit_bias=torch.tensor(-10.0)))


@pytest.mark.fault("F15")
def test_weights_that_are_cut_are_corrupt(toys: Toys, tmp_path: Path) -> None:
    write_config(tmp_path / "cut")
    (tmp_path / "cut" / WEIGHTS_FILE).write_bytes((toys.base / WEIGHTS_FILE).read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint, match=WEIGHTS_FILE):
        load(tmp_path / "cut")


@pytest.mark.parametrize(
    ("config", "pretrained", "says"),
    [
        ("ViT-B-61", None, "did you mean ViT-B-16"),
        ("ViT-B-16", "laion2b_s34b_b88", "did you mean laion2b_s34b_b88k"),
        ("ViT-B-16", "there/is/nothing", "does not exist"),
        ("ViT-B-16", "{toys}/base", "they differ in embed_dim, vision_cfg.head_width"),
        ("{toys}/config", None, "should hold one .safetensors file"),
        ("local-dir:{toys}/nowhere", None, "nowhere does not exist"),
        ("ViT-B-16", "{toys}/base/" + CONFIG_FILE, "may run code when opened"),
    ],
)
def test_base_that_cannot_be_had_is_a_clear_mistake(
    toys: Toys, tmp_path: Path, config: str, pretrained: str | None, says: str
) -> None:
    named = pretrained and pretrained.format(toys=toys.root)
    with pytest.raises(UserError, match=says):
        export_base(config.format(toys=toys.root), named, tmp_path / "made")


@pytest.mark.fault("F18")
def test_base_trained_with_another_activation_is_refused(toys: Toys, tmp_path: Path) -> None:
    config = write_config(tmp_path / "quick", quick_gelu=True)
    with pytest.raises(UserError, match="differ in quick_gelu"):
        export_base(str(config), str(toys.base), tmp_path / "made")


@pytest.mark.fault("F18")
@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": {"embed_dim": 4}}'])
def test_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(UserError, match=r"is not JSON|does not describe an open_clip model"):
        preprocess_cfg(tmp_path)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.norm = torch.nn.BatchNorm1d(2)


def test_tied_tensors_are_written_under_every_key_and_recorded(tmp_path: Path) -> None:
    model = Tied()
    write_weights(model.state_dict(), tmp_path / "t.safetensors", tied(model))
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tied"]) == {"b.weight": "a.weight"}
        assert torch.equal(file.get_tensor("a.weight"), file.get_tensor("b.weight"))
        assert file.get_tensor("norm.num_batches_tracked").dtype == torch.int64
    load_strictly(Tied(), tmp_path / "t.safetensors")


@pytest.mark.parametrize("entry", ['{"b.weight": "a.weight"}', '[["a.weight", "b.weight"]]'])
def test_tied_model_merges_from_what_this_version_and_older_ones_wrote(tmp_path: Path, entry: str) -> None:
    files = []
    for seed in range(3):
        torch.manual_seed(seed)
        state = Tied().state_dict()
        files.append(tmp_path / f"{seed}.safetensors")
        layout = {
            name: ("F32" if t.is_floating_point() else "I64", tuple(t.shape)) for name, t in state.items()
        }
        with CheckpointWriter(files[-1], layout, {"tied": entry}) as writer:
            for name, tensor in state.items():
                writer.write(name, 0, tensor.reshape(-1).numpy())
    merge("dare_ties", {}, files[0], files[1:], tmp_path / "merged.safetensors")
    load_strictly(Tied(), tmp_path / "merged.safetensors")
    with Checkpoint.open(tmp_path / "merged.safetensors") as merged:
        assert merged.raw("a.weight").tobytes() == merged.raw("b.weight").tobytes()


def test_saving_what_was_loaded_gives_the_same_bytes(toys: Toys, tmp_path: Path) -> None:
    save(load(toys.base), toys.base, tmp_path / "model")
    save(load(toys.base).state_dict(), toys.base, tmp_path / "state")
    assert sha256(tmp_path / "model") == sha256(tmp_path / "state") == sha256(toys.base)
    assert (tmp_path / "model" / CONFIG_FILE).read_bytes() == (toys.base / CONFIG_FILE).read_bytes()


@pytest.mark.parametrize("which", ["all", "image", "text"])
def test_trainable_names_a_tower_and_temperature_goes_with_text(toys: Toys, which: str) -> None:
    model = load(toys.base)
    names = set_trainable(model, which)
    assert {modality(name) for name in names} == ({"image", "text"} if which == "all" else {which})
    assert ("logit_scale" in names) == (which != "image")
    assert model.visual.training == (which != "text") and model.transformer.training == (which != "image")
    assert sum(p.requires_grad for p in model.parameters()) == len(names)


def test_tokenizer_is_open_clips_and_shared_by_models(toys: Toys, tmp_path: Path) -> None:
    save(load(toys.base), toys.base, tmp_path)
    assert tokenizer(toys.base) is tokenizer(tmp_path)
    expected = open_clip.get_tokenizer(f"local-dir:{toys.base}")(["a red thing", "an umbrella"])
    assert torch.equal(tokenizer(toys.base)(["a red thing", "an umbrella"]), expected)
    assert expected.shape == (2, MODEL_CFG["text_cfg"]["context_length"])


def test_loaded_models_are_open_clips_and_share_nothing(toys: Toys) -> None:
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{toys.base}")
    first = load(toys.base)
    set_trainable(first, "image")
    with torch.no_grad():
        for tensor in [*first.parameters(), *first.buffers()]:
            tensor.fill_(0)
    second = load(toys.base)
    assert str(second) == str(plain) and not second.training
    assert all(parameter.requires_grad for parameter in second.parameters())
    expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    found = {**dict(second.named_parameters()), **dict(second.named_buffers())}
    assert "attn_mask" in found and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_without_values_keep_ties_and_other_buffers() -> None:
    model = Tied()
    model.register_buffer("mask", torch.ones(2), persistent=False)
    copied = _without_values(_without_values(model, "meta"), "cpu")
    assert tied(copied) == tied(model) == {"b.weight": "a.weight"}
    assert torch.equal(copied.mask, torch.ones(2)) and copied.a.weight is not model.a.weight
