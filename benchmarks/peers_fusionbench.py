"""One merge by FusionBench in its own process. Run by an interpreter that has fusion-bench.

    PYTHON benchmarks/peers_fusionbench.py '{"case": "ties", "base": ..., "experts": [...], "out": ..., "threads": 2}'

FusionBench's algorithm classes take a pool of models. The pool here builds a module around the tensors of a safetensors file;
the merged module's state dict is saved to such a file. Prints one JSON line like `ours.py`.
The two tiny checkpoints of job["first"] are merged first, as ours are, so that libraries loaded at first use are loaded.

FusionBench's SVD methods take `nn.Linear` (OPCM) or two-dimensional tensors (Iso) as matrices. For them the fused attention
projections are split into q, k and v, as in the CLIP of transformers that they are written for, and fused again before saving.
"""

import json
import sys
import time
from importlib import import_module
from importlib.metadata import version
from typing import Any

PACKAGES = ("fusion-bench", "torch", "transformers", "numpy", "safetensors")
TRIM: dict[str, Any] = {"scaling_factor": 1.0, "threshold": 20, "remove_keys": [], "merge_func": "mean"}
# Iso-CTS squares the number of rows: 10 GB and a minute for the tiny model's table of 49408 tokens
MATRICES_ONLY = {"exclude_keys": ["token_embedding.weight"]}
# case -> class below fusion_bench.method, its arguments
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("SimpleAverageAlgorithm", {}),
    "ema_fold": ("WeightedAverageAlgorithm", {"normalize": False, "weights": [0.5, 0.5]}),
    "slerp_fold": ("SlerpMergeAlgorithm", {"t": 0.5}),
    "task_arithmetic": ("TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
    "magmax": ("MagMaxAlgorithm", {"scaling_factor": 0.5}),
    "ties": ("TiesMergingAlgorithm", TRIM),
    "dare_ties": (
        "DareTiesMerging",  # drops at random and then trims: it has no other DARE-TIES
        {"sparsity_ratio": 0.8, "only_on_linear_weights": False, "rescale": True, **TRIM},
    ),
    "iso_c": ("ISO_C_Merge", {"scaling_factor": 1.0, **MATRICES_ONLY}),
    "iso_cts": ("ISO_CTS_Merge", {"scaling_factor": 1.0, "common_space_fraction": 0.8, **MATRICES_ONLY}),
    "regmean": (
        "regmean.regmean.RegMeanAlgorithm",
        {
            "num_regmean_examples": 1,
            "exclude_param_names_regex": [],
            "reduce_non_diagonal_ratio": 0.95,
            "weight_transpose": True,
        },
    ),
    "opcm": ("opcm.opcm_general.OPCM", {"alpha": 0.5, "shuffle_order": False, "save_on_every_step": False}),
}
MATRICES = ("iso_c", "iso_cts", "opcm", "regmean")
FUSED, SPLIT = "attn.in_proj_", ("attn.q_proj.", "attn.k_proj.", "attn.v_proj.")


def main(job: dict[str, Any]) -> dict[str, float]:
    """Merge as the job says: first the two tiny checkpoints in job["first"], then what is measured."""
    began = time.perf_counter()
    import torch

    module, _, kind = f"fusion_bench.method.{METHODS[job['case']][0]}".rpartition(".")
    algorithm = getattr(import_module(module), kind)
    imported = time.perf_counter()
    torch.set_num_threads(job["threads"])
    merge(algorithm, job | job["first"])
    loaded, cpu = time.perf_counter(), time.process_time()
    merge(algorithm, job)
    spent = {"seconds": time.perf_counter() - loaded, "merge_cpu": time.process_time() - cpu}
    return {**spent, "import": imported - began, "load": loaded - imported}


def merge(kind: Any, job: dict[str, Any]) -> None:
    """One run of a new object of the class `kind`."""
    from safetensors.torch import save_file

    if job["case"] == "regmean":
        kind = _from_files(kind, dict(zip(_names(job), job["options"]["statistics"])))
    algorithm, split = kind(**METHODS[job["case"]][1]), job["case"] in MATRICES
    merged = algorithm.run(_pool(job, split))
    tensors = {key: value.detach().contiguous() for key, value in merged.state_dict().items()}
    save_file(_fuse(tensors) if split else tensors, job["out"], metadata={"format": "pt"})


def _pool(job: dict[str, Any], split: bool) -> Any:
    from fusion_bench.modelpool import BaseModelPool
    from safetensors.torch import load_file

    files = dict(zip(_names(job), job["experts"]))
    if job["base"]:
        files = {"_pretrained_": job["base"], **files}

    class Pool(BaseModelPool):
        def load_model(self, model_name_or_config: str, *_: Any, **__: Any) -> Any:
            tensors = load_file(files[model_name_or_config])
            return _module(_split(tensors) if split else tensors)

        def load_train_dataset(self, dataset_name: str, *_: Any, **__: Any) -> Any:
            return None  # what RegMean measures on it is in files

    return Pool(dict(files))


def _names(job: dict[str, Any]) -> list[str]:
    return [f"expert-{number}" for number in range(1, len(job["experts"]) + 1)]


def _from_files(kind: Any, files: dict[str, str]) -> Any:
    """RegMean whose Gram matrices are read from files by names of modules; q, k and v have the one of their input."""
    from safetensors.torch import load_file

    class FromFiles(kind):
        def get_regmean_weights(self, model_name: str, *_: Any, **__: Any) -> dict[str, Any]:
            found = {}
            for name, gram in load_file(files[model_name]).items():
                parts = [name.replace(FUSED, part) for part in SPLIT] if FUSED in name else [name]
                found |= {part.removesuffix(".weight"): gram for part in parts}
            return found

    return FromFiles


def _module(tensors: dict[str, Any]) -> Any:
    """Modules nested as the names say; a matrix called weight is a Linear, save for the table of tokens."""
    from torch import nn

    def child(parent: Any, name: str, path: str) -> Any:
        if not hasattr(parent, name):
            weight = tensors.get(f"{path}.weight")
            if weight is None or weight.ndim != 2 or "embedding" in name:
                parent.add_module(name, nn.Module())
            else:
                rows, columns = weight.shape
                bias = f"{path}.bias" in tensors
                parent.add_module(name, nn.Linear(columns, rows, bias=bias, device="meta"))
        return getattr(parent, name)

    root = nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        module = root
        for depth, parent in enumerate(parents, 1):
            module = child(module, parent, ".".join(parents[:depth]))
        setattr(module, leaf, nn.Parameter(tensor))
    return root


def _split(tensors: dict[str, Any]) -> dict[str, Any]:
    """Fused attention projections as q, k and v."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if FUSED in name:
            parts = zip(SPLIT, tensor.chunk(3), strict=True)
            out |= {name.replace(FUSED, part): values for part, values in parts}
        else:
            out[name] = tensor
    return out


def _fuse(tensors: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_split`."""
    import torch

    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if SPLIT[0] in name:
            out[name.replace(SPLIT[0], FUSED)] = torch.cat(
                [tensors[name.replace(SPLIT[0], p)] for p in SPLIT]
            )
        elif not any(part in name for part in SPLIT):
            out[name] = tensor
    return out


if __name__ == "__main__":
    wanted = sys.argv[1]
    print(
        json.dumps({p: version(p) for p in PACKAGES} if wanted == "--versions" else main(json.loads(wanted)))
    )
