"""What it costs to measure an expert and to learn a merge, as multiples of a forward pass over the same inputs.

    python benchmarks/evidence.py --size vit-b-16 --images 64 --experts 4
    python benchmarks/evidence.py --size vit-b-32 --images 256 --experts 1 --only "gram,published gram,fisher,published fisher"

Weights and pictures are random, because no cost depends on them. Every line is a process of its own. The published ways of Gram
matrices (hooks on linear modules, which do not see attention of open_clip) and of Fisher information (the squared gradient of a batch,
which is another quantity) stand beside ours.

Invariant: a ratio is of two times of one process, one after the other. Times are CPU seconds of all threads, so that a busy machine
changes them little.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
from inputs import SIZES, Architecture, make_inputs
from process import MIB, measure

KINDS = ("gram", "fisher", "fisher expectation", "kfac", "gradient", "published gram", "published fisher")
METHODS = ("adamerging", "supermerge", "dam", "concrete", "concrete_safe", "tinting")
MERGES = ("average", "regmean", "lot", "fisher", "wudi")
CLASSES, BATCH, CHUNK = 10, 16, 32


def configuration(size: str) -> dict[str, Any]:
    """An open_clip configuration of the architecture of this size."""
    one = SIZES[size]
    assert isinstance(one, Architecture)
    return {
        "model_cfg": {
            "embed_dim": one.embed,
            "vision_cfg": {
                "image_size": one.image, "layers": one.layers, "width": one.width, "patch_size": one.patch,
                "mlp_ratio": one.mlp / one.width, "head_width": 64 if one.width % 64 == 0 else 32,
            },
            "text_cfg": {
                "context_length": one.context, "vocab_size": one.vocabulary, "width": one.text_width,
                "heads": max(1, one.text_width // 64), "layers": one.text_layers,
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }  # fmt: skip


def arrays(size: str, images: int, seed: int) -> dict[str, Any]:
    """Random pictures with labels, a caption for each, and frozen embeddings of classes."""
    import numpy as np

    one, rng = SIZES[size], np.random.default_rng(seed)
    assert isinstance(one, Architecture)
    tokens = rng.integers(1, 1000, (images, one.context))
    tokens[:, one.context // 4] = one.vocabulary - 1  # the end of a text
    return {
        "images": rng.standard_normal((images, 3, one.image, one.image), np.float32),
        "tokens": tokens,
        "labels": rng.integers(0, CLASSES, images),
        "head": rng.standard_normal((CLASSES, one.embed), np.float32),
    }


def timed(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measured(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of a statistic, and of a forward pass of all its inputs; bytes of its file."""
    from workers.evidence import Asked, Inputs, Where
    from workers.evidence import measure as measure_one
    from workers.evidence.network import open_model
    from workers.evidence.passes import encode_images, encode_texts

    kind, _, how = job["kind"].partition(" ")
    given = arrays(job["size"], job["images"], 0)
    if kind != "gram" and how != "gram":
        given.pop("tokens")
    inputs, expert = Inputs.of(given), Path(job["experts"][0])
    model = open_model(expert, Asked("gram"), job["config"])

    def forward() -> None:
        import torch

        with torch.no_grad():
            for start in range(0, job["images"], CHUNK):
                encode_images(model, model.images(inputs)[start : start + CHUNK])
                if inputs.tokens is not None and kind == "gram":
                    encode_texts(model, model.tokens(inputs)[start : start + CHUNK])

    forward()
    unit = timed(forward)
    if kind == "published":
        seconds = timed(lambda: PUBLISHED[how](model, inputs))
        return {"seconds": seconds, "forward": unit, "bytes": 0}
    asked = Asked(
        kind,
        job["images"],
        labels="expectation" if how else "sample",
        towers="image" if kind != "gram" else None,
    )
    out = Path(job["out"]) / f"{kind}.safetensors"
    seconds = timed(lambda: measure_one(asked, Where(expert, None, out, job["config"]), inputs))
    return {"seconds": seconds, "forward": unit, "bytes": out.stat().st_size}


def published_gram(model: Any, inputs: Any) -> None:
    """Hooks on linear modules of the image tower, a sum of x^T x for each."""
    import torch

    from workers.evidence.passes import encode_images

    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def take(module: Any, given: Any, out: Any) -> None:
            flat = given[0].detach().reshape(-1, given[0].shape[-1])
            sums[name] = sums.get(name, 0) + flat.T @ flat

        return take

    layers = {n: one for n, one in model.model.visual.named_modules() if isinstance(one, torch.nn.Linear)}
    hooks = [one.register_forward_hook(hook(name)) for name, one in layers.items()]
    with torch.no_grad():
        for start in range(0, len(inputs.images), CHUNK):
            encode_images(model, model.images(inputs)[start : start + CHUNK])
    for one in hooks:
        one.remove()


def published_fisher(model: Any, inputs: Any) -> None:
    """The squared gradient of sqrt(p) log p summed over a batch, for all weights of the image tower."""
    import torch

    from workers.evidence.passes import classifier

    scores, named = classifier(model, inputs, "image"), list(model.model.visual.parameters())
    sums = [torch.zeros_like(one) for one in named]
    for start in range(0, len(inputs.images), CHUNK):
        log_p = scores.log_probabilities(model.images(inputs)[start : start + CHUNK], scores.embeddings())
        loss = (log_p.detach().exp().sqrt() * log_p).sum()
        for total, one in zip(sums, torch.autograd.grad(loss, named)):
            total.add_(one * one)


PUBLISHED = {"gram": published_gram, "fisher": published_fisher}


def learned(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, and of a forward pass of what it looks at; bytes of the file."""
    from workers.evidence import Asked, Inputs
    from workers.evidence.network import open_model
    from workers.evidence.passes import encode_images
    from workers.learning.learn import Where, learn
    from workers.learning.wanted import Wanted

    given = [arrays(job["size"], BATCH, seed) for seed in range(len(job["experts"]))]
    inputs = [Inputs.of({key: one for key, one in task.items() if key != "tokens"}) for task in given]
    model = open_model(Path(job["base"]), Asked("gram"), job["config"])

    def forward() -> None:
        import torch

        with torch.no_grad():
            for one in inputs:
                encode_images(model, model.images(one))

    forward()
    unit, ends = timed(forward), [time.process_time()]
    out = Path(job["out"]) / "learned.safetensors"
    where = Where(
        [Path(one) for one in job["experts"]], Path(job["base"]), out, job["config"],
        tell=lambda step, loss: ends.append(time.process_time()),
    )  # fmt: skip
    wanted = Wanted.of(job["kind"], {"steps": job["steps"] + 1, "batch_size": BATCH})
    learn(wanted, where, inputs)
    return {"seconds": (ends[-1] - ends[1]) / job["steps"], "forward": unit, "bytes": out.stat().st_size}


def merged(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of a merge with statistics that are made up, and of the average of the same experts."""
    import numpy as np

    from merge_service.merge import merge
    from merge_service.statistics import About, write
    from merge_service.techniques import get

    one, place = SIZES[job["size"]], Path(job["out"])
    needed = get(job["kind"]).evidence
    statistics = None
    if needed:
        file, rng = place / "made-up.safetensors", np.random.default_rng(0)
        write(file, dict(made_up(needed[0].kind, one.shapes(), rng)), About(needed[0].kind, {}, 1))
        statistics = [file] * len(job["experts"])
    ids = [f"e{number}" for number in range(len(job["experts"]))]

    def run(technique: str, given: Any) -> float:
        return timed(
            lambda: merge(
                technique, {}, job["base"], job["experts"], place / "model.safetensors", ids=ids,
                threads=job["threads"], statistics=given,
            )
        )  # fmt: skip

    run("average", None)
    return {"seconds": run(job["kind"], statistics), "forward": run("average", None), "bytes": 0}


def made_up(kind: str, shapes: dict[str, tuple[int, ...]], rng: Any) -> Any:
    """A statistic of every tensor that could have one: Gram matrices of matrices in blocks, or Fisher information."""
    import numpy as np

    for name, shape in shapes.items():
        if kind in ("fisher", "gradient"):
            yield name, rng.random(shape, np.float32)
        elif ".resblocks." in name and len(shape) == 2:
            rows = rng.standard_normal((2 * shape[1], shape[1]), np.float32)
            yield name, rows.T @ rows / len(rows)


GROUPS = {"measure": (measured, KINDS), "learn": (learned, METHODS), "merge": (merged, MERGES)}


def main() -> None:
    """Run every line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        choices=[name for name, one in SIZES.items() if type(one) is Architecture],
        default="tiny",
    )
    parser.add_argument("--images", type=int, default=64, help="of a statistic")
    parser.add_argument(
        "--steps", type=int, default=5, help="of learning, after a first one that does not count"
    )
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="names of lines, separated by commas")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "temporal-merge-bench")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    record.add_json(parser)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        sys.path.insert(0, str(record.ROOT))
        print(json.dumps(GROUPS[job["group"]][0](job)))
        return
    inputs = make_inputs(args.work, args.size, args.experts, args.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="evidence-", dir=args.work) as place:
        config = Path(place) / "configuration.json"
        config.write_text(json.dumps(configuration(args.size)))
        job = {
            "size": args.size, "images": args.images, "steps": args.steps, "threads": args.threads, "out": place,
            "base": str(inputs.base), "experts": [str(one) for one in inputs.experts], "config": str(config),
        }  # fmt: skip
        print(
            "| line | CPU seconds | of a forward pass (merges: of an average) | peak MiB | file / checkpoint |\n|---|---|---|---|---|"
        )
        for group, (_, names) in GROUPS.items():
            for name in names:
                if args.only and name not in args.only.split(","):
                    continue
                whole = json.dumps({**job, "group": group, "kind": name})
                run = measure([sys.executable, __file__, "--job", whole], args.threads, args.timeout)
                found[f"{group} {name}"] = run.as_json()
                if run.failure:
                    print(f"| {group} {name} | {run.failure} | | | |", flush=True)
                    continue
                seen = run.answer
                print(
                    f"| {group} {name} | {seen['seconds']:.3g} | {seen['seconds'] / seen['forward']:.2f} | {run.peak / MIB:.0f} | "
                    f"{seen['bytes'] / inputs.nbytes:.2f} |",
                    flush=True,
                )
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "work", "job")}
    record.save(args.json, settings, {**found, "checkpoint_bytes": inputs.nbytes})


if __name__ == "__main__":
    main()
