"""The meaning of tensor names: towers, stacks, depth; the same model under other names merges to the same numbers."""

from pathlib import Path

import numpy as np
import pytest

from merge_service.anatomy import anatomy_of, described, modality
from merge_service.errors import TechniqueError
from merge_service.merge import merge
from tests.merge_service import toys

LINES = {"lines_alpha": 0.25, "lines_beta": 0.5}


def depths(*names: str) -> dict[str, int | None]:
    anatomy = anatomy_of(dict.fromkeys(names, (2, 2)))
    return {name: anatomy.layer(name) for name in names}


CLIP = {
    "logit_scale": ((), "logit_scale"),
    "text_projection": ((6, 4), "text_projection.weight"),
    "token_embedding.weight": ((9, 6), "text_model.embeddings.token_embedding.weight"),
    "visual.proj": ((8, 4), "visual_projection.weight"),
    "visual.class_embedding": ((8,), "vision_model.embeddings.class_embedding"),
    **{
        f"visual.transformer.resblocks.{i}.mlp.c_fc.weight": ((16, 8), f"vision_model.encoder.layers.{i}.mlp.fc1.weight")
        for i in range(4)
    },
    **{
        f"transformer.resblocks.{i}.mlp.c_fc.weight": ((12, 6), f"text_model.encoder.layers.{i}.mlp.fc1.weight")
        for i in range(2)
    },
}  # fmt: skip
"""Shapes by open_clip's names, and the names that transformers gives them."""
PREFIXES = ("", "module.", "model.", "module.model.", "_orig_mod.")


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "technique", ["ties", "breadcrumbs_ties", "lines", "lines_ties", "lines_breadcrumbs_ties"]
)
def test_clip_under_other_usual_names_merges_to_the_same_numbers(
    tmp_path: Path, technique: str, prefix: str, library: str
) -> None:
    rng = np.random.default_rng(0)
    models = [{name: rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in CLIP.items()} for _ in range(3)]  # fmt: skip

    models = [toys.kin(models[0], model) for model in models]

    def merged(rename) -> dict[str, np.ndarray]:
        files = [
            toys.save(tmp_path / f"{i}.safetensors", {rename(n): v for n, v in model.items()})
            for i, model in enumerate(models)
        ]
        merge(technique, {}, files[0], files[1:], tmp_path / "o.safetensors")
        found = toys.load(tmp_path / "o.safetensors")
        return {name: found[rename(name)] for name in CLIP}

    def theirs(name: str) -> str:
        return prefix + (name if library == "open_clip" else CLIP[name][1])

    ours, other = merged(lambda name: name), merged(theirs)
    for name, value in ours.items():
        assert value.tobytes() == other[name].tobytes(), name


STAGED = {
    "open_clip ResNet": {"visual.layer1.0.conv1.w": 0, "visual.layer1.1.conv1.w": 1, "visual.layer2.0.conv1.w": 2, "visual.layer2.0.downsample.0.w": 2, "visual.conv1.w": None},
    "timm ConvNeXt": {"stages.0.blocks.0.dw.w": 0, "stages.1.blocks.0.dw.w": 1, "stages.1.blocks.1.dw.w": 2, "stages.1.downsample.0.w": 1, "stem.0.w": None},
    "transformers ConvNeXt": {"e.stages.0.layers.0.dw.w": 0, "e.stages.0.layers.1.dw.w": 1, "e.stages.1.layers.0.dw.w": 2, "e.stages.1.downsampling_layer.0.w": 2},
    "transformers Swin": {"e.layers.0.blocks.0.a.w": 0, "e.layers.0.blocks.1.a.w": 1, "e.layers.1.blocks.0.a.w": 2, "e.layers.0.downsample.norm.w": 1},
    "transformers ResNet": {"e.stages.0.layers.0.layer.0.c.w": 0, "e.stages.0.layers.0.layer.2.c.w": 0, "e.stages.1.layers.0.layer.0.c.w": 1},
    "EfficientNet": {"blocks.0.0.conv.w": 0, "blocks.1.0.conv.w": 1, "blocks.1.1.conv.w": 2, "conv_stem.w": None},
    "SegFormer": {"s.encoder.block.0.0.mlp.w": 0, "s.encoder.block.0.1.mlp.w": 1, "s.encoder.block.1.0.mlp.w": 2, "s.encoder.patch_embeddings.1.proj.w": None},
    "T5": {"encoder.block.0.layer.0.k.w": 0, "encoder.block.1.layer.1.k.w": 1, "decoder.block.0.layer.2.k.w": 0},
    "Mixtral": {"model.layers.0.moe.experts.7.w1.weight": 0, "model.layers.1.moe.experts.0.w1.weight": 1},
    "sentence-transformers": {"0.auto_model.encoder.layer.0.a.w": 0, "0.auto_model.encoder.layer.1.a.w": 1, "2.linear.w": None},
    "digits in words": {"layers.0.layer_norm1.w": 0, "layers.1.fc2.w": 1, "w1": None, "conv1.weight": None},
    "VGG": {"visual.features.0.weight": 0, "visual.features.3.weight": 3, "visual.classifier.1.weight": None},
    "CoCa": {"text_decoder.resblocks.0.mlp.w": 0, "text_decoder.resblocks.1.mlp.w": 1, "text_decoder.cross_attn.1.attn.w": 1},
}  # fmt: skip


@pytest.mark.parametrize("family", STAGED)
def test_block_number_is_the_outermost_one_counted_on_over_stages(family: str) -> None:
    expected = STAGED[family]
    assert depths(*expected) == expected


def test_towers_come_from_words_in_the_name_wherever_they_stand() -> None:
    for name, side in {
        "visual.proj": "image", "model.visual.blocks.0.w": "image", "vision_tower.vision_model.encoder.layers.0.w": "image",
        "visual_projection.weight": "image", "module.image_encoder.x": "image", "audio_model.layers.0.w": "audio",
        "text_model.encoder.layers.0.w": "text", "language_model.model.layers.0.w": "text", "logit_scale": "text",
        "multi_modal_projector.linear_1.weight": "text",
    }.items():  # fmt: skip
        assert modality(name) == side, name


def test_model_with_one_tower_has_one_group_and_encoder_and_decoder_are_two() -> None:
    one = anatomy_of({"model.layers.0.w": (2,), "lm_head.weight": (2, 2)})
    assert set(one.tower.values()) == {"model"}
    two = anatomy_of(
        {
            "model.encoder.layers.0.a.w": (2,),
            "model.decoder.layers.0.a.w": (2,),
            "model.shared.weight": (2, 2),
        }
    )
    assert (
        two.tower["model.encoder.layers.0.a.w"] == "encoder" and two.tower["model.shared.weight"] == "decoder"
    )
    assert (
        described(two.stacks)
        == "decoder: model.decoder.layers (1 block); encoder: model.encoder.layers (1 block)"
    )


def model(*names: str, value: float = 0.0) -> dict[str, np.ndarray]:
    return {name: np.full((3, 3), value, np.float32) for name in names}


def lined(tmp_path: Path, *names: str):
    base = toys.save(tmp_path / "b.safetensors", model(*names))
    expert = toys.save(tmp_path / "e.safetensors", model(*names, value=1.0))
    report = merge("lines", LINES, base, [expert], tmp_path / "o.safetensors")
    return report, {name: float(value[0, 0]) for name, value in toys.load(tmp_path / "o.safetensors").items()}


def test_resnet_tower_beside_a_transformer_is_scaled_by_depth(tmp_path: Path) -> None:
    image = [f"visual.layer{stage}.0.conv1.weight" for stage in range(1, 5)]
    report, found = lined(tmp_path, *image, "visual.stem.0.weight", "transformer.resblocks.0.c.w", "transformer.resblocks.1.c.w")  # fmt: skip
    assert [found[name] for name in image] == pytest.approx([0.25 + 0.5 * i / 3 for i in range(4)])
    assert found["transformer.resblocks.1.c.w"] == 0.75 and found["visual.stem.0.weight"] == 0.25
    assert report.stacks == {"image": {"visual.layer<s>": 4}, "text": {"transformer.resblocks": 2}}
    assert any("visual.stem" in note for note in report.notes)


def test_towers_of_two_stacks_have_the_depth_of_each(tmp_path: Path) -> None:
    encoder, decoder = ([f"model.{side}.layers.{i}.fc.weight" for i in range(n)] for side, n in (("encoder", 2), ("decoder", 3)))  # fmt: skip
    _, found = lined(tmp_path, *encoder, *decoder, "model.shared.weight")
    assert [found[name] for name in encoder] == [0.25, 0.75]
    assert [found[name] for name in decoder] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "strange",
    [
        ["visual.trunk.gadget.0.conv.weight", "visual.trunk.gadget.1.conv.weight", "visual.trunk.gadget.2.conv.weight"],
        [f"visual.trunk.gadget.{i}.weight" for i in range(5)],
    ],
)  # fmt: skip
def test_numbered_list_that_could_be_either_is_refused_by_name(tmp_path: Path, strange: list[str]) -> None:
    known = [f"visual.trunk.blocks.{i}.attn.weight" for i in range(2)]
    with pytest.raises(TechniqueError, match=r"not clear whether visual\.trunk\.gadget.*blocks \(2 blocks\)"):
        lined(tmp_path, *known, *strange)
    assert not (tmp_path / "o.safetensors").exists()
    base = toys.save(tmp_path / "b.safetensors", model(*known, *strange))
    merge("ties", {}, base, [base], tmp_path / "o.safetensors")


def test_sole_numbered_list_of_a_tower_is_its_stack_whatever_its_name(tmp_path: Path) -> None:
    _, found = lined(tmp_path, "visual.gadget.0.w", "visual.gadget.1.w", "transformer.resblocks.0.w")
    assert found["visual.gadget.1.w"] == 0.75


def test_list_of_one_entry_beside_a_stack_is_outside_blocks(tmp_path: Path) -> None:
    blocks = [f"visual.trunk.stages.{i}.blocks.0.mlp.fc1.weight" for i in range(3)]
    final = "visual.trunk.final_conv.conv_kxk.0.conv.weight"  # of MobileCLIP
    _, found = lined(tmp_path, *blocks, final)
    assert [found[name] for name in (*blocks, final)] == [0.25, 0.5, 0.75, 0.25]


def test_tower_without_numbered_blocks_is_said(tmp_path: Path) -> None:
    report, found = lined(tmp_path, "visual.conv.weight", "transformer.resblocks.0.c.w", "transformer.resblocks.1.c.w")  # fmt: skip
    assert found["visual.conv.weight"] == 0.25 and "no numbered blocks in the image tower" in report.notes[0]
