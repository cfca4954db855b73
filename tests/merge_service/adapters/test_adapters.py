"""Adapters as weights: equal to what peft makes of them, the same for every span, and refused where they cannot be computed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import open_weights
from merge_service.checkpoints.adapters import updates
from merge_service.engine import Split
from merge_service.errors import CheckpointError, UserError
from merge_service.merge import advance, merge, retract
from merge_service.similarity import similarity
from tests.merge_service.adapters import peft_cases
from tests.merge_service.parts import here
from tests.merge_service.toys import load, save


def plus(base: Path, adapter: Path) -> Path:
    return Path(f"{base}+{adapter}")


def read(path: Path, base: Path | None = None) -> dict[str, np.ndarray]:
    with open_weights(path, base) as held:
        return {name: held.read(name).reshape(info.shape).copy() for name, info in held.tensors.items()}


@pytest.mark.parametrize("case", peft_cases.names())
def test_adapter_on_its_base_equals_the_weights_that_peft_merges(case, tmp_path) -> None:
    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, case)
    found, want = read(plus(base, adapter)), peft_cases.merged(case)
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, rtol=1e-6, err_msg=name)
    untouched = peft_cases.arrays("base/").keys() - peft_cases.arrays(f"{case}/merged/").keys()
    assert all(np.array_equal(found[name], want[name]) for name in untouched)


@pytest.mark.parametrize("case", ["patterns", "dora", "dora_of_gpt2", "tokens", "modules_to_save"])
def test_spans_of_any_size_and_order_give_the_same_bits(case, tmp_path, monkeypatch) -> None:
    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, case)
    monkeypatch.setattr(updates, "GROUP", 12)
    with open_weights(plus(base, adapter)) as held:
        for name, info in held.tensors.items():
            whole = held.read(name).tobytes()
            for step in (1, 5, 13):
                starts = range(0, info.numel, step)
                parts = {at: held.read(name, at, at + step).copy() for at in reversed(starts)}
                assert np.concatenate([parts[at] for at in starts]).tobytes() == whole, name
            assert held.raw(name).tobytes() == whole


def test_merge_of_adapters_equals_the_merge_of_what_they_make(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    adapters = [peft_cases.adapter(tmp_path, case) for case in ("plain", "rslora", "dora", "bias_all")]
    whole = [save(tmp_path / f"{one.name}.safetensors", read(plus(base, one))) for one in adapters]
    ids = [f"e{number}" for number in range(4)]
    for technique, params in (
        ("task_arithmetic", {"scale": 0.3}),
        ("ties", {"density": 0.5}),
        ("dare_ties", {"density": 0.5, "seed": 3}),
        ("iso_c", {}),
        ("model_stock", {}),
        ("magmax", {}),
    ):
        options = {"ids": ids, "measure": False}
        merge(technique, params, base, adapters, tmp_path / "a.safetensors", threads=2, **options)
        merge(technique, params, base, whole, tmp_path / "b.safetensors", **options)
        one, other = load(tmp_path / "a.safetensors"), load(tmp_path / "b.safetensors")
        assert all(np.array_equal(one[name], other[name]) for name in other), technique


def test_stream_of_adapters_has_the_bytes_of_their_merge(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    adapters = [peft_cases.adapter(tmp_path, case) for case in ("plain", "rslora")]
    merge("ties", {}, base, adapters, tmp_path / "all.safetensors", ids=["a", "b"])
    advance("ties", {}, base, adapters[0], None, expert_id="a", state_in=None, state_out=tmp_path / "1")
    out = tmp_path / "stream.safetensors"
    advance(
        "ties", {}, base, adapters[1], out, expert_id="b", state_in=tmp_path / "1", state_out=tmp_path / "2"
    )
    assert out.read_bytes() == (tmp_path / "all.safetensors").read_bytes()


def test_merge_of_adapters_in_parts_has_the_bytes_of_the_merge(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    adapters = [peft_cases.adapter(tmp_path, "plain"), plus(base, peft_cases.adapter(tmp_path, "dora"))]
    outs = [tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"]
    for out, split in zip(outs, (None, Split(2, here))):
        merge("ties", {"density": 0.5}, base, adapters, out, ids=["a", "b"], split=split)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_adapter_is_taken_out_of_a_stream_again(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    adapters = [peft_cases.adapter(tmp_path, case) for case in ("plain", "rslora")]
    state, params = None, {"scale": 0.5}
    for number, path in enumerate(adapters):
        after = tmp_path / f"{number}.state"
        advance(
            "task_arithmetic",
            params,
            base,
            path,
            None,
            expert_id=str(number),
            state_in=state,
            state_out=after,
        )
        state = after
    assert state is not None
    out = tmp_path / "left.safetensors"
    retract(
        "task_arithmetic",
        params,
        base,
        adapters[0],
        out,
        expert_id="0",
        state_in=state,
        state_out=tmp_path / "s",
    )
    merge("task_arithmetic", params, base, adapters[1:], tmp_path / "one.safetensors", ids=["1"])
    found, want = load(out), load(tmp_path / "one.safetensors")
    assert all(np.allclose(found[name], want[name], atol=1e-6) for name in want)


def test_small_update_of_a_bfloat16_base_is_not_rounded_away(tmp_path) -> None:
    dtypes = dict.fromkeys(peft_cases.arrays("base/"), "BF16")
    base, adapter = peft_cases.base(tmp_path, dtypes), peft_cases.adapter(tmp_path, "plain", lora_alpha=0.01)
    found, before = read(plus(base, adapter)), read(base)
    factors = peft_cases.arrays("plain/adapter/base_model.model.layers.0.q.lora_")
    np.testing.assert_allclose(
        found["layers.0.q.weight"] - before["layers.0.q.weight"],
        0.005 * factors["B.weight"] @ factors["A.weight"],
        atol=1e-7,
    )
    merge("average", {}, base, [plus(base, adapter)], tmp_path / "out.safetensors")
    with open_weights(tmp_path / "out.safetensors") as made:
        assert {info.dtype for info in made.tensors.values()} == {"BF16"}


def test_adapters_may_stand_on_each_other(tmp_path) -> None:
    base, one, two = (
        peft_cases.base(tmp_path),
        peft_cases.adapter(tmp_path, "plain"),
        peft_cases.adapter(tmp_path, "rslora"),
    )
    found = read(plus(plus(base, one), two))
    name = "layers.1.k.weight"
    want = peft_cases.merged("plain")[name] + peft_cases.merged("rslora")[name] - load(base)[name]
    np.testing.assert_allclose(found[name], want, atol=1e-6)
    merge(
        "average", {}, None, [plus(plus(base, one), two), base], tmp_path / "named.safetensors"
    )  # by content
    np.testing.assert_allclose(
        load(tmp_path / "named.safetensors")[name], (want + load(base)[name]) / 2, atol=1e-6
    )


def test_base_is_the_named_one_else_the_merges_else_the_configurations(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    adapter = peft_cases.adapter(tmp_path, "plain", base_model_name_or_path="org/model")
    with pytest.raises(CheckpointError, match=r"org/model.*no path here.*BASE\+"):
        read(adapter)
    want = read(plus(base, adapter))
    with open_weights(adapter, base) as held:
        assert "org/model" in held.notes[0]
    own = peft_cases.adapter(tmp_path, "plain", "own", base_model_name_or_path=str(base))
    assert all(np.array_equal(value, want[name]) for name, value in read(own).items())
    other = save(
        tmp_path / "other.safetensors",
        {name: value + 1 for name, value in peft_cases.arrays("base/").items()},
    )
    with pytest.raises(CheckpointError, match=r"says that its base is .*base.safetensors, which is not"):
        read(own, other)
    read(plus(other, own))


def test_one_adapter_is_told_from_another_and_its_base_from_another(tmp_path) -> None:
    base = peft_cases.base(tmp_path)
    other = save(
        tmp_path / "other.safetensors",
        {name: value + 1 for name, value in peft_cases.arrays("base/").items()},
    )
    one = peft_cases.adapter(tmp_path, "plain")
    scaled = peft_cases.adapter(tmp_path, "plain", "scaled", lora_alpha=6)
    paths = [plus(base, one), plus(base, scaled), plus(other, one)]
    digests = []
    for path in paths:
        with open_weights(path) as held:
            digests.append((*held.digests(), held.fingerprint()))
    assert all(len(set(column)) == 3 for column in zip(*digests))
    assert similarity(base, {"one": one, "scaled": scaled}).cosine()[0, 1] == pytest.approx(1)


def test_names_under_another_prefix_are_found_with_a_note(tmp_path) -> None:
    adapter = peft_cases.adapter(tmp_path, "plain")
    below = {f"transformer.{name}": value for name, value in peft_cases.arrays("base/").items()}
    with open_weights(plus(save(tmp_path / "below.safetensors", below), adapter)) as held:
        assert "with 'transformer.' before them" in held.notes[0]
        found = held.read("transformer.layers.0.q.weight")
    assert np.allclose(found, peft_cases.merged("plain")["layers.0.q.weight"].reshape(-1), atol=1e-6)


def test_kohya_names_alphas_and_other_components(tmp_path) -> None:
    base, factors = peft_cases.base(tmp_path), peft_cases.arrays("plain/adapter/base_model.model.")
    held = {}
    for name, value in factors.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        joined = f"lora_unet_{module.replace('.', '_')}"
        held[f"{joined}.lora_{'down' if factor == 'A' else 'up'}.weight"] = value
        held[f"{joined}.alpha"] = np.array(5, np.float32)
        held[
            f"lora_te_{module.replace('.', '_')}_of_text.lora_{factor.replace('A', 'down').replace('B', 'up')}.weight"
        ] = value
    file = save(tmp_path / "style.safetensors", held)
    with open_weights(plus(base, file)) as made:
        assert "'lora_te_' belong to another component" in made.notes[0]
        for name in made.tensors:
            want = peft_cases.merged("plain")[name].reshape(-1)
            np.testing.assert_allclose(made.read(name), want, atol=1e-6)
    save(tmp_path / "locon.safetensors", {**held, "lora_unet_layers_0_q.lora_mid.weight": held[min(held)]})
    with pytest.raises(CheckpointError, match="LoCon"):
        read(plus(base, tmp_path / "locon.safetensors"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*Convert"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"a_new_key": 3}, "a_new_key is '3'"),
        ({"r": 4}, "rank 2, the configuration says 4"),
        ({"r": None}, "r is None"),
        ({"use_dora": True}, "use_dora is True, but layers.0.[kq] has no magnitude"),
        ({"alpha_pattern": {"(a+)+": 3}}, "repeats a group"),
        ({"alpha_pattern": {"(": 3}}, "adapter_config.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_name(changes, said, tmp_path) -> None:
    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, "plain", **changes)
    with pytest.raises(UserError, match=said):
        read(plus(base, adapter))
    with pytest.raises(UserError, match=said):
        merge("average", {}, base, [adapter], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_adapter_of_another_base_is_refused_by_module_and_shape(tmp_path) -> None:
    adapter, held = peft_cases.adapter(tmp_path, "plain"), peft_cases.arrays("base/")
    wide = save(tmp_path / "wide.safetensors", {**held, "layers.1.k.weight": np.ones((9, 6), np.float32)})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.k has the shape \[9, 6\].*factors are for \[4, 6\]"
    ):
        read(plus(wide, adapter))
    short = save(tmp_path / "short.safetensors", {n: v for n, v in held.items() if "layers.1" not in n})
    with pytest.raises(CheckpointError, match=r"layers\.1\.[kq], which is no module"):
        read(plus(short, adapter))


@pytest.mark.parametrize(
    ("lost", "said"), [("lora_A", "factor A of layers.0.k is missing"), ("lora_B", "factor B")]
)
def test_half_an_adapter_is_refused(lost, said, tmp_path) -> None:
    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, "plain")
    held = peft_cases.arrays("plain/adapter/")
    save(
        adapter / "adapter_model.safetensors",
        {n: v for n, v in held.items() if f"layers.0.k.{lost}" not in n},
    )
    with pytest.raises(CheckpointError, match=said):
        read(plus(base, adapter))


def test_pickled_adapter_is_converted_and_never_unpickled(tmp_path) -> None:
    import torch

    from merge_service.checkpoints import convert

    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, "plain")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(adapter / "adapter_config.json", pickled)
    tensors = {n: torch.from_numpy(v) for n, v in peft_cases.arrays("plain/adapter/").items()}
    torch.save(tensors, pickled / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle.*temporal-merge convert"):
        read(plus(base, pickled))
    made = convert(pickled, tmp_path / "made")
    assert json.loads((made.out / "adapter_config.json").read_text()) == peft_cases.config("plain")
    want = read(plus(base, adapter))
    assert all(np.array_equal(value, want[name]) for name, value in read(plus(base, made.out)).items())


def test_missing_side_of_a_plus_is_named_and_a_plus_in_a_name_is_a_name(tmp_path) -> None:
    base, adapter = peft_cases.base(tmp_path), peft_cases.adapter(tmp_path, "plain")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/gone does not exist"):
        read(plus(tmp_path / "gone", adapter))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/gone does not exist"):
        read(plus(base, tmp_path / "gone"))
    named = save(tmp_path / "a+b.safetensors", peft_cases.arrays("base/"))
    assert np.array_equal(read(named)["head.weight"], read(base)["head.weight"])
