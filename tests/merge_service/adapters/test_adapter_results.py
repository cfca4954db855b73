"""Adapters as results: exact by concatenation, nearest by a rank, and opened again as what they are."""

import json
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import CheckpointWriter, open_weights
from merge_service.errors import UserError
from merge_service.merge import merge
from pipeline.merging.adapters import extract_adapter, merge_to_adapter
from pipeline.merging.files import Execution, FileMerge
from tests.merge_service.adapters import peft_cases
from tests.merge_service.toys import load, save

ONE = Execution(threads=1)


def read(path: Path) -> dict[str, np.ndarray]:
    with open_weights(path) as held:
        return {name: held.read(name).reshape(info.shape).copy() for name, info in held.tensors.items()}


@pytest.mark.parametrize(
    ("technique", "params"),
    [
        ("average", {}),
        ("average", {"weights": [0.2, 0.5, 0.3]}),
        ("task_arithmetic", {"scale": 0.4, "weights": [1, 2, -0.5]}),
        ("lines_task_arithmetic", {"lines_alpha": 0.2, "lines_beta": 0.8}),
        ("task_arithmetic", {"coefficients": {"layers.0.*": [1, 0, 2], "*": [0.5, 0.5, 0.1]}}),
    ],
)
def test_concatenation_equals_the_merge_of_whole_models(technique, params, tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    cases = ("patterns", "convolutions", "attention")
    adapters = [peft_cases.adapter(tmp_path, case) for case in cases]
    made = merge_to_adapter(
        FileMerge(technique, params, base, adapters, tmp_path / "out", replace=False), None, ONE
    )
    merge(technique, params, base, adapters, tmp_path / "whole.safetensors", ids=list("abc"))
    found, want = read(made.out), load(tmp_path / "whole.safetensors")
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    assert made.residual == 0 and made.rank == 3


@pytest.mark.parametrize(
    "cases", [("plain", "rslora"), ("convolutions", "convolutions"), ("tokens", "plain")]
)
def test_concatenation_adds_ranks_or_refuses_what_has_no_factors(cases, tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    adapters = [peft_cases.adapter(tmp_path, case, f"{number}{case}") for number, case in enumerate(cases)]
    what = FileMerge("average", {}, base, adapters, tmp_path / "out", replace=False)
    if "tokens" in cases:
        with pytest.raises(UserError, match=r"tokens does more to embed.weight than adding"):
            merge_to_adapter(what, None, ONE)
        assert not (tmp_path / "out").exists()
        return
    made = merge_to_adapter(what, None, ONE)
    assert made.rank == sum(peft_cases.config(case)["r"] for case in cases)
    with pytest.raises(UserError, match="is there already"):
        merge_to_adapter(what, None, ONE)


def test_technique_that_is_not_linear_needs_a_rank_and_says_what_it_leaves(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    adapters = [peft_cases.adapter(tmp_path, case) for case in ("plain", "rslora")]
    what = FileMerge("ties", {}, base, adapters, tmp_path / "out", replace=False)
    with pytest.raises(UserError, match=r"ties is not linear.*--rank"):
        merge_to_adapter(what, None, ONE)
    merge("ties", {}, base, adapters, tmp_path / "whole.safetensors", ids=list("ab"))
    want, start = load(tmp_path / "whole.safetensors"), load(base)
    residuals = []
    for rank in (1, 3, 6):
        made = merge_to_adapter(FileMerge("ties", {}, base, adapters, tmp_path / f"r{rank}"), rank, ONE)
        found = read(made.out)
        moved = sum(float(((want[name] - start[name]) ** 2).sum()) for name in want)
        left = sum(float(((want[name] - found[name]) ** 2).sum()) for name in want)
        assert made.residual == pytest.approx((left / moved) ** 0.5, abs=1e-5)
        residuals.append(made.residual)
    assert residuals[0] > residuals[1] > residuals[2] and residuals[2] < 1e-5


@pytest.mark.parametrize("case", ["plain", "conv1d_of_gpt2", "embeddings", "convolutions", "attention"])
def test_extracted_adapter_of_an_adapted_model_is_that_adapter_again(case, tmp_path) -> None:
    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, case)
    whole = save(tmp_path / "whole.safetensors", read(Path(f"{base}+{adapter}")))
    made = extract_adapter(whole, base, peft_cases.config(case)["r"], tmp_path / "out")
    assert made.residual < 1e-5 and made.without == ()
    found, want = read(made.out), load(whole)
    assert all(np.allclose(found[name], want[name], atol=1e-5) for name in want)


def test_extraction_names_what_an_adapter_does_not_hold(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    held = peft_cases.arrays("base/")
    held["layers.0.norm.bias"] += 3
    held["layers.0.q.weight"] += 0.01
    made = extract_adapter(save(tmp_path / "tuned.safetensors", held), base, 1, tmp_path / "out")
    assert made.without == ("layers.0.norm.bias",)
    assert made.left_out == pytest.approx(made.residual, abs=1e-3) and made.left_out > 0.99
    with pytest.raises(UserError, match="does not differ from the base"):
        extract_adapter(base, base, 1, tmp_path / "none")
    with pytest.raises(UserError, match="rank 0"):
        extract_adapter(tmp_path / "tuned.safetensors", base, 0, tmp_path / "none")
    still = FileMerge("average", {}, base, [base, base], tmp_path / "none")
    with pytest.raises(UserError, match=r"^the merged model does not differ from the base"):
        merge_to_adapter(still, 1, ONE)
    assert not (tmp_path / "none").exists()
    twice = FileMerge("average", {}, base, [tmp_path / "tuned.safetensors"] * 2, tmp_path / "twice")
    assert any("hold the same tensors" in note for note in merge_to_adapter(twice, 1, ONE).notes)


def test_matrices_of_gpt2_are_written_as_peft_has_them(tmp_path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"h.0.attn.c_attn.weight": (6, 18), "h.0.attn.c_proj.weight": (6, 6), "lm_head.weight": (9, 6)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tuned = {
        name: value + 0.01 * rng.normal(size=value.shape).astype(np.float32) for name, value in start.items()
    }
    base, model = save(tmp_path / "base.safetensors", start), save(tmp_path / "tuned.safetensors", tuned)
    made = extract_adapter(model, base, 6, tmp_path / "out")
    assert json.loads((made.out / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    held = load(made.out / "adapter_model.safetensors")
    assert held["base_model.model.h.0.attn.c_attn.lora_A.weight"].shape == (6, 6)
    assert held["base_model.model.h.0.attn.c_attn.lora_B.weight"].shape == (18, 6)
    assert all(np.allclose(value, tuned[name], atol=1e-5) for name, value in read(made.out).items())
    square = {"h.0.mlp.gate.weight": np.eye(6, dtype=np.float32)}
    base = save(tmp_path / "base.safetensors", {**start, **square})
    model = save(
        tmp_path / "tuned.safetensors", {**tuned, "h.0.mlp.gate.weight": 1.01 * np.eye(6, dtype=np.float32)}
    )
    with pytest.raises(UserError, match=r"gate.*could not be told"):
        extract_adapter(model, base, 6, tmp_path / "mixed")


def test_adapter_that_could_not_be_replaced_is_as_it_was(tmp_path, monkeypatch) -> None:
    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, "patterns")
    whole, out = save(tmp_path / "whole.safetensors", read(Path(f"{base}+{adapter}"))), tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError("full")

    extract_adapter(whole, base, 1, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with monkeypatch.context() as broken, pytest.raises(OSError, match="full"):
        broken.setattr(CheckpointWriter, "write", full)
        extract_adapter(whole, base, 2, out, force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert extract_adapter(whole, base, 2, out, force=True).rank == 2


def test_adapters_of_two_bases_do_not_add_up(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    other = save(tmp_path / "other.safetensors", {n: v + 0.01 for n, v in peft_cases.arrays("base/").items()})
    adapter = peft_cases.adapter(tmp_path, "plain")
    what = FileMerge("average", {}, base, [adapter, Path(f"{other}+{adapter}")], tmp_path / "out")
    with pytest.raises(UserError, match=r"is an adapter of .*other.safetensors"):
        merge_to_adapter(what, None, ONE)


@pytest.mark.parametrize("case", ["patterns", "conv1d_of_gpt2", "convolutions", "embeddings"])
def test_peft_opens_what_is_written(case, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    import torch

    from tests.merge_service.adapters.peft_reference import Tiny

    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, case)
    what = FileMerge("task_arithmetic", {"scale": 1}, base, [adapter, adapter], tmp_path / "out")
    made = merge_to_adapter(what, None, ONE)
    model = Tiny()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in load(base).items()})
    merged = peft.PeftModel.from_pretrained(model, made.out).merge_and_unload().state_dict()
    want = read(made.out)
    assert merged.keys() == want.keys()
    for name, value in merged.items():
        np.testing.assert_allclose(value.numpy(), want[name], atol=1e-5, err_msg=name)
