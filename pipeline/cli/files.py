"""The commands for files: checkpoints, techniques, data roots.

Invariant: importing this module stays cheap; a command imports what it needs when it is called.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from merge_service.errors import UserError
from pipeline.cli.merging import technique_names
from pipeline.cli.options import AsJson, Force, Modules, Overrides, print_json, use_modules


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A weights directory or a .safetensors file.")
    ],
    study: Annotated[
        Path | None,
        typer.Option(
            "--study", metavar="STUDY.yaml", help="Says which data and which model; or give --root."
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="A data root, without a study: every dataset of it that has the split.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="With --root: what a file is that has no open_clip_config.json beside it.",
        ),
    ] = None,
    datasets: Annotated[
        str | None, typer.Option("--datasets", metavar="a,b", help="Default: all that the study scores.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="test|val", help="Default: the study's evaluation.split."),
    ] = None,
    details: Annotated[
        str | None,
        typer.Option(
            "--details",
            metavar="all|top5,...",
            help="Also top5, mean_per_class (the usual one of pets, flowers, aircraft), per_class, confusion.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score one checkpoint exactly as a run would: zero-shot top-1, retrieval recall@5, KA, ZS and GM.

    With --root no study is needed: the datasets of any data root are scored.

    Example: temporal-merge evaluate merged.safetensors --study configs/demo.yaml --details top5,mean_per_class
    """
    from pipeline.cli.show import show_scores
    from pipeline.run.evaluation import score, study_of_root, with_split
    from pipeline.study.config import load_study
    from workers.scoring.details import DETAILS

    if study is not None and root is None and model is None:
        chosen, names = load_study(study, overrides or []), _listed(datasets)
    elif root is not None and study is None:
        chosen = study_of_root(root, checkpoint, model, overrides or [])
        names = _listed(datasets) or with_split(chosen, split)
    else:
        raise UserError("give --study STUDY.yaml, or --root DIR (with --model where the checkpoint needs it)")
    asked = list(DETAILS) if details == "all" else _listed(details)
    answer = score(checkpoint, chosen, names, split, asked)
    for note in answer["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print_json(answer) if as_json else show_scores(answer)


def measure(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="gram, fisher, kfac or gradient.")],
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A weights directory or a .safetensors file.")
    ],
    study: Annotated[
        Path, typer.Option("--study", metavar="STUDY.yaml", help="Says which data and which model.")
    ],
    task: Annotated[
        str, typer.Option("--task", metavar="NAME", help="The task whose training split is used.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file of the statistic.")],
    examples: Annotated[
        int | None,
        typer.Option("--examples", metavar="N", help="How many are drawn; default 256 (gradient: 128)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw, and of sampled labels.")] = 0,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="sample|expectation|given",
            help="Of which classes gradients are taken (fisher, kfac). Default sample.",
        ),
    ] = None,
    towers: Annotated[
        str | None,
        typer.Option(
            "--towers",
            metavar="both|image",
            help="both: class scores through both towers of the checkpoint; image: with class embeddings and temperature of the "
            "study's base. Default both.",
        ),
    ] = None,
    precision: Annotated[str, typer.Option("--precision", metavar="fp32|bf16")] = "fp32",
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="A torch device such as cuda.")
    ] = "cpu",
    overrides: Overrides = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure what a technique needs to know of an expert on data: once, for every merge of it.

    gram: regmean, lot, mats. fisher: fisher, mats. kfac: mats. gradient, of the base: tatr. Never reads a test split.

    Example: temporal-merge measure gram expert.safetensors --study configs/demo.yaml --task digits --out expert.gram.safetensors
    """
    from pipeline.merging.measuring import OfTask, measure_task
    from pipeline.study.config import load_study
    from workers.evidence import Asked

    if out.exists() and not force:
        raise UserError(f"--out {out} is there already; give another --out, or replace it with --force")
    given = {"examples": examples, "seed": seed, "labels": labels, "towers": towers, "precision": precision, "device": device}  # fmt: skip
    asked = Asked.of(kind, given)
    found = measure_task(asked, OfTask(checkpoint, load_study(study, overrides or []), task, out))
    size = out.stat().st_size
    answer = {"out": str(out), "kind": kind, "examples": found.about.examples, "tensors": len(found), "bytes": size,
              "expert_sha256": found.about.expert_sha256}  # fmt: skip
    if as_json:
        print_json(answer)
        return
    print(f"{out}: {kind} of {len(found)} tensors over {found.about.examples} examples, {size / 1e6:.1f} MB")


def _listed(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def techniques(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One technique in full.", autocompletion=technique_names),
    ] = None,
    modules: Modules = None,
    as_json: AsJson = False,
) -> None:
    """List the merging techniques, or explain one: formula, parameters, needs, forms, paper.

    Example: temporal-merge techniques ties
    """
    from pipeline.cli.show_files import show_techniques
    from pipeline.merging.techniques import techniques_as_json

    use_modules(modules)
    print_json(techniques_as_json(name)) if as_json else show_techniques(name)


def check(
    suite: Annotated[
        Path,
        typer.Argument(metavar="SUITE.yaml", help="A suite file, e.g. configs/fomo_in_flux/datasets.yaml."),
    ],
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="The folder that holds the datasets.")],
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Read every shard whole and decode every picture, not only manifests."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which datasets of a suite are there, which are missing or wrong, and what to do about each.

    Ends with code 2 while something is missing or wrong. Example: temporal-merge check configs/fomo_in_flux/datasets.yaml --root /data/fomo_in_flux
    """
    from pipeline.study.suites import check as check_root
    from pipeline.study.suites import read_suite_file, summary

    asked = read_suite_file(suite)
    answer = summary(asked, root, check_root(asked, root, deep))
    if as_json:
        print_json(answer)
    else:
        for finding in answer["findings"]:
            print(f"{finding['what']:8} {finding['dataset']} ({finding['role']}): {finding['text']}")
        unread = "" if deep else "; samples were not looked at (--deep)"
        print(
            f"{root}: {answer['usable']} of {answer['datasets']} datasets of {asked.name} are ready{unread}"
        )
    if not answer["complete"]:
        raise typer.Exit(2)


def publish(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder of an adapter or a model; for llama.cpp a GGUF file."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="vllm|sglang|llamacpp", help="The kind of server.")],
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="Where it listens, e.g. http://127.0.0.1:8000.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="Its name before the digits of its content, by default the folder's. For llama.cpp a model of a router.",
            show_default=False,
        ),
    ] = None,
    there: Annotated[
        str | None,
        typer.Option(
            "--there",
            metavar="PATH",
            help="The path of the same files as the server sees them, if it is another.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key-from",
            metavar="VARIABLE",
            help="The environment variable with the server's bearer token.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load an adapter or a merged model into a running vLLM, SGLang or llama.cpp, under a name that says its content.

    Example: temporal-merge publish merged-adapter --to vllm --url http://127.0.0.1:8000
    """
    from pipeline.merging.publish import Publication
    from pipeline.merging.publish import publish as load

    found = load(Publication(source, to, url, name, there, key))
    if as_json:
        print_json({"name": found.name, "request": found.request, "answer": found.answer})
    else:
        print(f"{found.name}: loaded by {url} ({found.request})")
