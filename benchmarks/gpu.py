"""How fast a card trains what we feed it, and merges: pictures a second of ViT-B/32 and ViT-B/16, the share of time that kernels run,
and seconds of merges beside the CPU's.

    python benchmarks/gpu.py --minutes 8 [--json [FILE]]

Needs torch, numpy and safetensors alone; with open_clip the models are its own, else towers of the same shapes. Pictures come through
the ring that experts are fed by, from memory. Without a card it runs on the CPU, with few steps of small batches.

Invariant: the loop asks no tensor for its value; numbers are read when they have come.
"""

import argparse
import importlib.util
import json
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_merge import merges
from inputs import SIZES

from workers.data.share import CROP_DRAWS, Share, crop_boxes
from workers.feed.device import Host, device_of
from workers.feed.pixels import Pixels
from workers.feed.ring import feed
from workers.training.engines.protocol import Report
from workers.training.numbers import Pending

SIDE, CONTEXT, VOCABULARY, EMBEDDING = 224, 77, 49408, 512
PREPROCESS = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
PATCHES = {"ViT-B-32": 32, "ViT-B-16": 16}


@dataclass(frozen=True)
class Memory:
    """Random pictures of a pool in memory; crops and texts as an expert draws them."""

    pool: np.ndarray
    batch: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, SIDE, SIDE, 3)

    def share(self, step: int) -> Share:
        """Depends on the step alone."""
        draw = np.random.default_rng(step)
        rows = draw.integers(0, len(self.pool), self.batch)
        boxes = crop_boxes(draw.random((self.batch, CROP_DRAWS)), SIDE, SIDE, (0.9, 1.0), (3 / 4, 4 / 3))
        tokens = draw.integers(1, VOCABULARY - 1, (min(64, self.batch), CONTEXT))
        tokens[:, -1] = VOCABULARY - 1
        places = draw.integers(0, len(tokens), self.batch)
        return Share(np.zeros(self.batch), rows, boxes.astype(np.float32), tokens, places)

    def read(self, share: Share, start: int, stop: int, out: np.ndarray) -> None:
        """Pictures start..stop of a share."""
        for row, at in zip(out, share.rows[start:stop].tolist(), strict=True):
            row[...] = self.pool[at]


class Tower(nn.Module):
    """A transformer before which something makes [b, n, width], and of which one place is projected."""

    def __init__(self, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(length, width) * 0.01)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.projection = nn.Linear(width, EMBEDDING, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.normalize(self.projection(self.layers(x + self.positions, mask)[:, -1]), dim=-1)


class Clip(nn.Module):
    """The shapes of CLIP's ViT-B with patches of `patch`."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, patch, patch, bias=False)
        self.image = Tower(768, 12, 12, (SIDE // patch) ** 2)
        self.words = nn.Embedding(VOCABULARY, 512)
        self.text = Tower(512, 12, 8, CONTEXT)
        self.register_buffer("mask", torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1), persistent=False)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.image(self.patches(images).flatten(2).transpose(1, 2))
        return image, self.text(self.words(tokens), self.mask)


def model(name: str) -> nn.Module:
    """open_clip's, where it is there."""
    if importlib.util.find_spec("open_clip") is None:
        return Clip(PATCHES[name])
    import open_clip

    found: nn.Module = open_clip.create_model(name)
    return found


class Trainer:
    """Steps of one model: bf16 autocast, contrastive loss over the batch, clipping, fused AdamW."""

    def __init__(self, name: str, device: Host) -> None:
        self._model = model(name).to(device.place).train()
        self._parameters = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-5, weight_decay=0.2, fused=True)

    def step(self, images: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> Report:
        """One step; nothing is waited for."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            image, text, *_ = self._model(images, tokens)
        logits = 50 * image.float() @ text.float().index_select(0, places).T
        labels = torch.arange(len(images), device=images.device)
        loss = (
            nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)
        ) / 2
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return Report(torch.stack([loss.detach(), norm]), 1e-5)


def train(name: str, pool: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second and what the card did meanwhile."""
    device = device_of(args.device)
    trainer, pending = Trainer(name, device), Pending(device)
    pixels, shares = Pixels(PREPROCESS, device.place), Memory(pool, args.batch_size)
    losses: list[float] = []
    spans: list[tuple[float, float]] = []
    deadline = time.monotonic() + 60 * args.minutes / len(PATCHES) / 3
    steps = range(args.warm + args.steps + args.profiled)
    with closing(feed(shares, pixels, device, steps, args.loaders)) as batches:
        began, counted = time.perf_counter(), 0
        for step, batch in batches:
            if step == args.warm:
                _finish(device)
                began, counted = time.perf_counter(), 0
            losses += [one.loss for one in pending.add(step, trainer.step(*batch))]
            counted += 1
            if step + 1 == args.warm + args.steps or time.monotonic() > deadline:
                break
        _finish(device)
        wall = time.perf_counter() - began
        if device.place.type == "cuda":
            spans = _profiled(batches, trainer, pending, args.profiled)
    losses += [one.loss for one in pending.rest()]
    said = {
        "images_per_s": counted * args.batch_size / wall,
        "steps": counted,
        "kernels": _share(spans) if spans else None,
        "loss": losses[-1],
    }
    if device.place.type == "cuda":
        said["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return said


def _finish(device: Host) -> None:
    done = device.event()
    done.record()
    done.synchronize()


def _profiled(batches: Any, trainer: Trainer, pending: Pending, count: int) -> list[tuple[float, float]]:
    """Begin and end (microseconds) of every kernel of `count` more steps."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _, (step, batch) in zip(range(count), batches, strict=False):
            list(pending.add(step, trainer.step(*batch)))
        torch.cuda.synchronize()
    return [
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    ]


def _share(spans: list[tuple[float, float]]) -> float:
    """Of the time between the first kernel and the last, how much some kernel ran."""
    covered, reached = 0.0, -np.inf
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return float(covered / (reached - min(begin for begin, _ in spans)))


def fed(pool: np.ndarray, args: argparse.Namespace) -> float:
    """Pictures a second that the ring brings to the device while nothing else is done there."""
    device = device_of(args.device)
    shares, steps = Memory(pool, args.batch_size), range(args.steps + 1)
    with closing(feed(shares, Pixels(PREPROCESS, device.place), device, steps, args.loaders)) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in batches:
            pass
        _finish(device)
    return args.steps * args.batch_size / (time.perf_counter() - began)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; on a CPU little is asked."""
    card = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if card else "cpu")
    parser.add_argument("--models", default=",".join(PATCHES))
    parser.add_argument("--batch-size", type=int, default=512 if card else 4)
    parser.add_argument("--warm", type=int, default=10 if card else 1, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=200 if card else 2)
    parser.add_argument("--profiled", type=int, default=10, help="more steps, under the profiler")
    parser.add_argument("--loaders", type=int, default=8 if card else 1)
    parser.add_argument("--pool", type=int, default=8192 if card else 64, help="pictures in memory")
    parser.add_argument("--merge-size", choices=SIZES, default="vit-b-16" if card else "tiny")
    parser.add_argument(
        "--experts", type=int, default=8 if card else 2, help="of a merge; 0 leaves merging out"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it, about")
    parser.add_argument(
        "--json", nargs="?", const=True, metavar="FILE", help="write the numbers to a file as well"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print one JSON object."""
    args = parse(arguments)
    began = time.monotonic()
    pool = np.random.default_rng(0).integers(0, 255, (args.pool, SIDE, SIDE, 3), dtype=np.uint8)
    said: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "towers": "open_clip" if importlib.util.find_spec("open_clip") else "of the same shapes",
        "batch_size": args.batch_size,
        "fed_per_s": fed(pool, args),
        "models": {name: train(name, pool, args) for name in args.models.split(",")},
    }
    if args.experts:
        end = began + 60 * args.minutes
        said["merges"] = merges(args.device, args.merge_size, args.experts, args.loaders, end)
    text = json.dumps(said)
    if isinstance(args.json, str):
        Path(args.json).write_text(f"{text}\n")
    print(text)
    return said


if __name__ == "__main__":
    main()
