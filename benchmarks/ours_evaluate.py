"""A stream of checkpoints scored by `evaluate` in its own process. `evaluate.py` starts it and defines the job.

Prints one JSON line: scores, wall and CPU seconds of the whole stream without imports, seconds of the first checkpoint
(which maps or decodes the datasets and reads the tokenizer) and of the later ones, and the limit: CPU seconds of only the
model's forward passes over ready pixels and tokens.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from workers.data.decode import load
from workers.jobs import EvaluateJob, Source
from workers.scoring.evaluate import Encoder, evaluate, subset


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Score every checkpoint on every dataset, then measure the limit with the last one."""
    sources = tuple(Source(job["root"], name, "test") for name in (*job["classification"], *job["retrieval"]))
    found: dict[str, Any] = {"scores": {}}
    score(job | {"cache": job["decoded"]}, job["models"][0], sources[:1])  # before any clock starts
    each: list[tuple[float, float]] = []
    for directory in job["models"]:
        began = time.perf_counter(), time.process_time()
        answer = score(job, directory, sources)
        each.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        found["scores"][directory] = answer["scores"]
    for at, clock in enumerate(("wall", "cpu")):
        seconds = [pair[at] for pair in each]
        found |= {
            clock: sum(seconds),
            f"{clock}_first": seconds[0],
            f"{clock}_later": median(seconds[1:] or seconds),
        }
    if job["limits"]:
        found["limit"] = min(limit(job, sources) for _ in range(job["limits"]))
    return found | {"images": sum(answer["samples"].values())}


def score(job: dict[str, Any], directory: str, sources: tuple[Source, ...]) -> dict[str, Any]:
    """What `evaluate` answers for one checkpoint."""
    return evaluate(
        EvaluateJob(
            "benchmark", "a merge", directory, sources, fraction=job["fraction"],
            batch_size=job["batch_size"], threads=job["threads"], cache=job["cache"],
        )
    )  # fmt: skip


def limit(job: dict[str, Any], sources: tuple[Source, ...]) -> float:
    """CPU seconds of the two towers alone."""
    torch.set_num_threads(job["threads"])
    encoder = Encoder(Path(job["models"][-1]), "cpu", job["batch_size"])
    spent = 0.0
    for source in sources:
        samples = load(source, encoder.preprocess["size"], job["cache"], encoder.preprocess)
        rows = subset(samples, job["fraction"], 0)
        texts = (
            [template.replace("{c}", name) for name in samples.classes for template in samples.templates]
            if samples.classes
            else [caption for row in rows for caption in samples.captions[row]]
        )
        pixels = torch.rand(len(rows), 3, *samples.images.shape[1:3])
        tokens = encoder.tokens(texts)
        began = time.process_time()
        with torch.inference_mode():
            for start in range(0, len(pixels), job["batch_size"]):
                encoder.model.encode_image(pixels[start : start + job["batch_size"]], normalize=True)
            for start in range(0, len(tokens), job["batch_size"]):
                encoder.model.encode_text(tokens[start : start + job["batch_size"]], normalize=True)
        spent += time.process_time() - began
    return spent


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
