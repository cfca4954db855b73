"""How many pictures a second reach a device, beside what memory, the decoder and torch's DataLoader could deliver.

    python benchmarks/feed.py              # two cores, a few minutes
    python benchmarks/feed.py --json       # one JSON object on the last line
    python benchmarks/feed.py --json FILE  # every value, with the circumstances

Pictures of JPEG, written below --work once, are decoded into the cache as a study does it, or read as they are stored, and fed to a
*pretended device* that takes a batch and is busy with it for as long as a card would be. README.md in this directory says what the
numbers are.

Invariant: contenders alternate within a round, and a ratio is taken within a round, so that whatever else slows the machine meets
both of its sides.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
import simplejpeg
import torch
from PIL import Image
from torch.nn import functional

from workers.data.batches import Batches
from workers.feed.device import Host
from workers.feed.ring import feed
from workers.jobs import EngineSpec, Source, TrainJob
from workers.training.recipe import Recipe

SIDE = 224
ORIGINAL = (500, 375)
"""Width and height of a picture as it is stored, near the mean of ImageNet's."""
CLASSES = 10
PREPROCESS = {"size": SIDE, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


class Pretended(Host):
    """A device with room for three batches, whose copies cost the CPU nothing, as those of a card."""

    slots, overlaps = 3, True


def picture(number: int) -> bytes:
    """A JPEG of coarse and fine structure, of a size and compressibility like a photograph's."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
        ORIGINAL, Image.Resampling.BICUBIC
    )
    fine = draw.normal(0, 6, (ORIGINAL[1], ORIGINAL[0], 3))
    pixels = np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def written(work: Path, count: int) -> Source:
    """A dataset of `count` pictures in shards of 256, made once."""
    name = f"photographs-{count}"
    home = work / "data" / name
    if not (home / "train" / "nshards.txt").is_file():
        (home / "train").mkdir(parents=True, exist_ok=True)
        lines = {
            "dataset_type": "classification",
            "classnames": "\n".join(f"thing {n}" for n in range(CLASSES)),
            "zeroshot_classification_templates": "a {c}\na photo of a {c}.",
        }
        for file, text in lines.items():
            (home / f"{file}.txt").write_text(f"{text}\n")
        shards = range(0, count, 256)
        for shard, first in enumerate(shards):
            with tarfile.open(home / "train" / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for number in range(first, min(first + 256, count)):
                    for suffix, data in (("jpg", picture(number)), ("cls", str(number % CLASSES).encode())):
                        member = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        (home / "train" / "nshards.txt").write_text(f"{len(shards)}\n")
    return Source(str(work / "data"), name, "train")


def batches(source: Source, work: Path, size: int) -> Batches:
    """Those of an expert that trains on nothing else. Tokens are made up, 77 to a text."""
    job = TrainJob(
        fingerprint="benchmark", label="", t=1, task="photographs", init="", base="", update=(source,), buffer=(), pretraining=(),
        recipe=Recipe(batch_size=size).model_dump(), steps=1, seed=1, engine=EngineSpec(), scratch="", checkpoint_every=0, out="",
        cache=str(work / "cache"),
    )  # fmt: skip
    return Batches(job, lambda texts: torch.tensor([[len(text)] * 77 for text in texts]), PREPROCESS)


def as_they_are(images: torch.Tensor, boxes: torch.Tensor | None = None) -> torch.Tensor:
    """In the place of `Pixels`: a device would do it."""
    return images


def seconds(work: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fed(shares: Batches, steps: range, loaders: int) -> float:
    """Pictures a second to a batch that is ready to be copied, on all cores."""

    def work() -> None:
        for _ in feed(shares, as_they_are, Pretended(), steps, loaders):  # type: ignore[arg-type]
            pass

    return len(steps) * shares.batch_size / seconds(work)


def memcpy(shares: Batches, count: int, loaders: int) -> float:
    """Pictures a second of a plain copy of as many bytes, in parts, each by a thread of its own."""
    source = np.ones((3, *shares.shape), np.uint8)  # not from a cache of the processor
    target = np.ones(shares.shape, np.uint8)
    edges = [len(target) * n // loaders for n in range(loaders + 1)]

    def work() -> None:
        with ThreadPoolExecutor(loaders) as hands:
            for step in range(count):
                list(
                    hands.map(
                        lambda a, b, s=source[step % 3]: np.copyto(target[a:b], s[a:b]), edges, edges[1:]
                    )
                )

    return count * shares.batch_size / seconds(work)


def busy(shares: Batches, steps: range, loaders: int, takes: float) -> float:
    """Share of the time, from its first batch on, that a device is busy which takes a batch every `takes` seconds."""
    with closing(feed(shares, as_they_are, Pretended(), steps, loaders)) as coming:  # type: ignore[arg-type]
        next(coming)
        began = time.perf_counter()
        time.sleep(takes)
        for _ in coming:
            time.sleep(takes)
        return len(steps) * takes / (time.perf_counter() - began)


def decoder(files: list[bytes], shares: Batches, steps: range, loaders: int, resize: bool = True) -> float:
    """Pictures a second of decoding by itself, without the resize or with it: files in memory, pieces known, nothing kept."""
    pieces = np.concatenate([shares.share(step).pieces for step in steps]).tolist()

    def cut(first: int) -> None:
        for number in range(first, len(pieces), loaders):
            whole = simplejpeg.decode_jpeg(files[number % len(files)], colorspace="RGB")
            if resize:
                top, left, height, width = pieces[number]
                piece = torch.from_numpy(whole[top : top + height, left : left + width]).permute(2, 0, 1)[
                    None
                ]
                piece = piece.contiguous(memory_format=torch.channels_last)
                functional.interpolate(piece, size=shares.shape[1:3], mode="bicubic", antialias=True)

    def work() -> None:
        with ThreadPoolExecutor(loaders) as hands:
            list(hands.map(cut, range(loaders)))

    return len(pieces) / seconds(work)


class Encoded(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The pictures of the shards through open_clip's own training transform."""

    def __init__(self, source: Source) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self._places: list[tuple[str, int, int]] = []
        for shard in sorted((Path(source.root) / source.dataset / source.split).glob("*.tar")):
            with tarfile.open(shard) as archive:
                self._places += [
                    (str(shard), m.offset_data, m.size) for m in archive if m.name.endswith("jpg")
                ]
        self._transform = image_transform_v2(PreprocessCfg(size=SIDE), is_train=True)

    def __len__(self) -> int:
        return len(self._places)

    def file(self, index: int) -> bytes:
        """A picture as it is stored."""
        shard, offset, size = self._places[index]
        with Path(shard).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def __getitem__(self, index: int) -> torch.Tensor:
        found: torch.Tensor = self._transform(Image.open(io.BytesIO(self.file(index))))
        return found


def passes(pictures: Encoded, size: int, cores: int) -> Callable[[], float]:
    """Pictures a second of torch's DataLoader with a process for each core, which stay; four batches of each process at a call.

    A pass begins and ends with nothing made ahead, so that all work is within what is timed, and none beside the others.
    """
    count = 4 * cores * size
    sampler = torch.utils.data.RandomSampler(pictures, num_samples=count, replacement=True)
    loader = torch.utils.data.DataLoader(
        pictures, size, sampler=sampler, num_workers=cores, persistent_workers=True
    )
    return lambda: count / seconds(lambda: [None for _ in loader])


MEASURED = (
    "decoded_per_s", "memcpy_per_s", "encoded_per_s", "decoder_per_s", "decode_only_per_s", "dataloader_per_s", "busy",
)  # fmt: skip
RATIOS = {
    "decoded_to_memcpy": ("decoded_per_s", "memcpy_per_s"),
    "encoded_to_decoder": ("encoded_per_s", "decoder_per_s"),
    "encoded_to_decode_only": ("encoded_per_s", "decode_only_per_s"),
    "encoded_to_dataloader": ("encoded_per_s", "dataloader_per_s"),
}
"""What is compared within a round."""


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Every value of every round."""
    torch.set_num_threads(1)
    source = written(args.work, args.pictures)
    shares = batches(source, args.work, args.batch_size)
    stored = batches(replace(source, reading="encoded"), args.work, args.batch_size)
    pictures = Encoded(source)
    files = [pictures.file(number) for number in range(min(len(pictures), args.batch_size))]
    found: dict[str, list[float]] = {key: [] for key in MEASURED}
    loader = passes(pictures, args.loader_batch, args.cores)
    for number in range(args.rounds + 1):  # the first fills the page cache and starts processes
        steps = range(args.steps * number, args.steps * (number + 1))
        few, some = (range(part * number, part * (number + 1)) for part in (args.few, args.some))
        values = {
            "decoded_per_s": fed(shares, steps, args.cores),
            "memcpy_per_s": memcpy(shares, args.steps, args.cores),
            "encoded_per_s": fed(stored, few, args.cores),
            "decoder_per_s": decoder(files, stored, few, args.cores),
            "decode_only_per_s": decoder(files, stored, few, args.cores, resize=False),
            "dataloader_per_s": loader(),
            "busy": busy(shares, some, args.cores, args.takes),
        }
        for key, value in values.items():
            found[key] += [value] if number else []
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=2048, help="in the dataset, default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--loader-batch", type=int, default=64, help="of torch's DataLoader")
    parser.add_argument(
        "--steps",
        type=int,
        default=96,
        help="of decoded pictures in a round; buffers are new in the first ones",
    )
    parser.add_argument("--some", type=int, default=12, help="steps of the pretended device in a round")
    parser.add_argument("--few", type=int, default=12, help="steps of encoded pictures in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cores", type=int, default=os.cpu_count() or 1, help="threads or processes of every contender"
    )
    parser.add_argument(
        "--takes", type=float, default=0.15, help="seconds that the pretended device is busy with a batch"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench" / "feed"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=True,
        metavar="FILE",
        help="print one JSON object, or write the values of every round to a file",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, save."""
    args = parse(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    found = measure(args)
    ratios = {
        name: [ours / plain for ours, plain in zip(found[one], found[other], strict=True)]
        for name, (one, other) in RATIOS.items()
    }
    said: dict[str, Any] = {key: median(values) for key, values in (found | ratios).items()}
    if isinstance(args.json, str):
        settings = {
            n: getattr(args, n)
            for n in (
                "pictures",
                "batch_size",
                "loader_batch",
                "steps",
                "some",
                "few",
                "rounds",
                "cores",
                "takes",
            )
        }
        record.save(Path(args.json), settings, {"rounds": found, "ratios": ratios})
    print(
        json.dumps(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in said.items()}
        )
    )
    return said


if __name__ == "__main__":
    main()
