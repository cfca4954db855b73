"""Costs agree with the published table and with arithmetic."""

import pytest

from merge_service.errors import UserError
from tests.workers.model_helpers import MODEL_CFG, Toys
from workers.training.budget import measure, memory_ratio

TABLE = {  # FoMo-in-Flux, ViT-B/16, batch 512: (GFLOPs per step, memory multiplier), from images/gflops.png
    "all": (63394.7585, 1.0),
    "image": (57254.6183, 0.8064),  # locked text
    "text": (27176.6698, 0.2551),  # locked image
}


@pytest.mark.parametrize("trainable", ["all", "image", "text"])
def test_operations_of_vit_b_16_differ_from_the_table_by_the_products_of_the_loss_alone(
    trainable: str,
) -> None:
    """open_clip's loss multiplies features twice where one product and its transpose would do; the table has one."""
    cost = measure("ViT-B-16", 512, trainable, "fp16")
    product = 2 * 512**3 / 1e9
    ours, theirs = (4, 2) if trainable == "image" else (6, 3)
    assert cost.gflops_per_step - TABLE[trainable][0] == pytest.approx((ours - theirs) * product, abs=1e-3)
    assert cost.gflops_per_sample == cost.gflops_per_step / 512
    assert cost.parameters == 149_620_737 and cost.weights_bytes == 4 * cost.parameters
    if trainable != "all":
        ratio = memory_ratio("ViT-B-16", 512, trainable, "fp16")
        assert ratio == pytest.approx(TABLE[trainable][1], rel=0.05), (
            "theirs counts the driver's memory as well"
        )


def tower(layers: int, width: int, tokens: int) -> int:
    """Operations of one transformer forward on one sample: four projections, an MLP of 4 widths, attention."""
    return layers * (tokens * 2 * width * width * 12 + 2 * 2 * tokens * tokens * width)


def test_operations_of_a_tiny_model_equal_arithmetic_in_every_precision(toys: Toys) -> None:
    vision, text, d, batch = MODEL_CFG["vision_cfg"], MODEL_CFG["text_cfg"], MODEL_CFG["embed_dim"], 8
    tokens = (32 // 8) ** 2 + 1
    linear = tower(2, vision["width"], tokens) + tower(1, text["width"], 8)
    attention = 2 * 2 * (2 * tokens**2 * vision["width"] + 8**2 * text["width"])
    patches = 2 * 16 * 3 * 8 * 8 * vision["width"]
    projections = 2 * d * (vision["width"] + text["width"])
    loss = 2 * 2 * batch * d
    expected = (
        3 * (linear + patches + projections + loss) + attention // 2 - patches
    )  # fused backward: 5 products for 2
    for precision in ("fp32", "bf16", "fp16"):
        found = measure(toys.base, batch, "all", precision)
        assert found.gflops_per_sample * 1e9 == pytest.approx(expected, rel=1e-9)


def test_memory_grows_with_batch_and_shrinks_with_frozen_towers_and_half_precision(toys: Toys) -> None:
    cost = measure(toys.base, 64)
    assert cost.peak_bytes == cost.weights_bytes + 3 * 4 * cost.trained_parameters + cost.activation_bytes
    assert measure(toys.base, 128).activation_bytes > 1.9 * cost.activation_bytes
    assert measure(toys.base, 64, precision="bf16").activation_bytes < cost.activation_bytes
    image, text = (measure(toys.base, 64, which) for which in ("image", "text"))
    assert image.trained_parameters + text.trained_parameters == cost.trained_parameters == cost.parameters
    assert max(image.activation_bytes, text.activation_bytes) < cost.activation_bytes
    assert memory_ratio(toys.base, 64, "all", "fp32") == 1


def test_cost_of_an_unknown_model_is_a_mistake() -> None:
    with pytest.raises(UserError, match="did you mean ViT-B-16"):
        measure("ViT-B-61", 8)
