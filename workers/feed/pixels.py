"""Conversion of uint8 pictures to model input on the device of the model: the one place of cropping and normalisation.

Training and scoring share it, so both see the same pixels.
Invariant: without a crop, the result equals torchvision's ToTensor and Normalize bit for bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional


class Pixels:
    """The pixel conversion of a model on one device, from `mean` and `std` of its preprocess_cfg.

    With `channels_last` the output has torch's memory format of that name.
    """

    def __init__(
        self, preprocess: Mapping[str, Any], device: torch.device, channels_last: bool = False
    ) -> None:
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        self._mean, self._std = (
            torch.tensor(preprocess[key], dtype=torch.float32).view(1, 3, 1, 1).to(device)
            for key in ("mean", "std")
        )

    def __call__(self, images: torch.Tensor, boxes: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [b, 3, H, W] from uint8 [b, H, W, 3], cropped to `boxes` float32 [b, 4] (see `crop`) if given."""
        pixels = images.permute(0, 3, 1, 2)
        pixels = (pixels.contiguous() if boxes is None else pixels).to(torch.float32).div_(255)
        if boxes is not None:
            pixels = crop(pixels, boxes)
        return pixels.sub_(self._mean).div_(self._std).to(memory_format=self._layout)


def crop(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Crop one box of each image and resize it to the size of the image; float32 [b, 3, H, W].

    `images` float32 [b, 3, H, W]; `boxes` float32 [b, 4] are (top, left, height, width) as shares of the image. Sampling is bilinear;
    pixels at the edge are repeated outside.
    """
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = boxes[:, 3], boxes[:, 2]
    theta[:, 0, 2] = 2 * boxes[:, 1] + boxes[:, 3] - 1
    theta[:, 1, 2] = 2 * boxes[:, 0] + boxes[:, 2] - 1
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
