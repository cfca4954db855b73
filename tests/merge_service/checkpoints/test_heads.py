"""Output layers that are tied to the embedding by the configuration alone, and experts and adapters that trained the two apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from merge_service.checkpoints import open_weights
from merge_service.checkpoints.ties import BrokenTie
from merge_service.engine import Split
from merge_service.errors import AdapterCheckpoint
from merge_service.merge import advance, merge
from tests.merge_service.parts import here
from tests.merge_service.toys import load, save

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS, WIDTH, RANK = 9, 4, 2
Arrays = dict[str, np.ndarray]


def draw(seed: int, *shape: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def folder(place: Path, tensors: Arrays, tied: bool = True, architecture: str = "LlamaForCausalLM") -> Path:
    place.mkdir()
    save(place / "model.safetensors", tensors)
    said = {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": WORDS,
        "tie_word_embeddings": tied,
    }
    (place / "config.json").write_text(json.dumps(said))
    return place


def adapter(place: Path, tensors: Arrays) -> Path:
    place.mkdir()
    save(
        place / "adapter_model.safetensors",
        {f"base_model.model.{name}": one for name, one in tensors.items()},
    )
    said = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["x"],
        "modules_to_save": None,
    }
    (place / "adapter_config.json").write_text(json.dumps(said))
    return place


def model() -> Arrays:
    return {EMBED: 10 * draw(0, WORDS, WIDTH), "model.layers.0.mlp.weight": 10 * draw(1, 8, WIDTH)}


def of_head() -> Arrays:
    return {"lm_head.lora_A.weight": draw(2, RANK, WIDTH), "lm_head.lora_B.weight": draw(3, WORDS, RANK)}


def of_embedding() -> Arrays:
    name = "model.embed_tokens.lora_embedding"
    return {f"{name}_A": draw(4, RANK, WORDS), f"{name}_B": draw(5, WIDTH, RANK)}


def head_moved() -> np.ndarray:
    return of_head()["lm_head.lora_B.weight"] @ of_head()["lm_head.lora_A.weight"]


def embedding_moved() -> np.ndarray:
    one, other = of_embedding().values()
    return (other @ one).T


def kept(name: str) -> Arrays:
    return {name: model()[EMBED] + draw(6 if name == EMBED else 7, WORDS, WIDTH)}


CASES = {
    "factors of the head": (of_head(), 0 * head_moved(), head_moved()),
    "factors of the embedding": (of_embedding(), embedding_moved(), 0 * head_moved()),
    "factors of both": ({**of_head(), **of_embedding()}, embedding_moved(), head_moved()),
    "a copy of the head": (kept(HEAD), 0 * head_moved(), draw(7, WORDS, WIDTH)),
    "a copy of the embedding": (kept(EMBED), draw(6, WORDS, WIDTH), 0 * head_moved()),
    "copies of both": ({**kept(EMBED), **kept(HEAD)}, draw(6, WORDS, WIDTH), draw(7, WORDS, WIDTH)),
}


@pytest.mark.parametrize("case", CASES)
def test_adapter_of_a_tied_base_moves_what_it_was_trained_for_and_the_result_says_that_nothing_is_tied(
    case: str, tmp_path: Path
) -> None:
    tensors, embedding, head = CASES[case]
    base, trained = folder(tmp_path / "base", model()), adapter(tmp_path / "adapter", tensors)
    report = merge("average", {}, base, [trained], tmp_path / "out")
    found, start = load(tmp_path / "out"), model()[EMBED]
    np.testing.assert_allclose(found[EMBED], start + embedding, atol=1e-6)
    np.testing.assert_allclose(found[HEAD], start + head, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("ties lm_head.weight to" in note for note in report.notes)
    assert any("tie_word_embeddings: false" in note for note in report.notes)


def test_adapter_that_moves_both_alike_leaves_them_tied(tmp_path: Path) -> None:
    """peft's `ensure_weight_tying`; its merge up to 0.21.2 adds the update twice."""
    one, other = of_embedding().values()
    tensors = {
        **of_embedding(),
        "lm_head.lora_A.weight": other.T.copy(),
        "lm_head.lora_B.weight": one.T.copy(),
    }
    base, trained = folder(tmp_path / "base", model()), adapter(tmp_path / "adapter", tensors)
    merge("average", {}, base, [trained], tmp_path / "out")
    found = load(tmp_path / "out")
    assert HEAD not in found
    np.testing.assert_allclose(found[EMBED], model()[EMBED] + embedding_moved(), atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_adapter_of_a_head_whose_name_is_not_known_is_refused(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model(), architecture="OtherModel")
    trained = adapter(tmp_path / "adapter", kept(EMBED))
    with pytest.raises(AdapterCheckpoint, match=rf"changes {EMBED} alone.*tie_word_embeddings: false"):
        open_weights(Path(f"{base}+{trained}"))


def experts(room: Path) -> tuple[Path, Path, Path]:
    """A tied base, a tied expert, and one whose head was trained apart."""
    base = model()
    tied = {name: one + draw(20 + at, *one.shape) for at, (name, one) in enumerate(base.items())}
    apart = {name: one + draw(30 + at, *one.shape) for at, (name, one) in enumerate(base.items())}
    apart[HEAD] = base[EMBED] + draw(40, WORDS, WIDTH)
    return folder(room / "base", base), folder(room / "tied", tied), folder(room / "apart", apart, tied=False)


@pytest.mark.parametrize("split", [None, Split(2, here)], ids=["alone", "in parts"])
def test_experts_with_and_without_a_head_of_their_own_merge_into_a_tied_base(
    split: Split | None, tmp_path: Path
) -> None:
    base, tied, apart = experts(tmp_path)
    for number, order in enumerate(([tied, apart], [apart, tied])):
        out = tmp_path / f"out{number}"
        merge("task_arithmetic", {"scale": 0.5}, base, order, out, split=split)
        found, start = load(out), model()[EMBED]
        moved = [load(one)[EMBED] - start for one in (tied, apart)]
        np.testing.assert_allclose(found[EMBED], start + 0.5 * (moved[0] + moved[1]), atol=1e-6)
        moved[1] = load(apart)[HEAD] - start
        np.testing.assert_allclose(found[HEAD], start + 0.5 * (moved[0] + moved[1]), atol=1e-6)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_stream_of_tied_experts_refuses_one_with_a_head_of_its_own(tmp_path: Path) -> None:
    base, tied, apart = experts(tmp_path)
    states = [tmp_path / f"{at}.safetensors" for at in range(3)]
    advance("ties", {}, base, tied, None, expert_id="a", state_in=None, state_out=states[0])
    with pytest.raises(BrokenTie, match=r"as one tensor, .*apart.* as two"):
        advance("ties", {}, base, apart, None, expert_id="b", state_in=states[0], state_out=states[1])


def test_stream_that_begins_with_a_head_of_its_own_goes_on_with_a_tied_expert(tmp_path: Path) -> None:
    base, tied, apart = experts(tmp_path)
    states = [tmp_path / f"{at}.safetensors" for at in range(2)]
    advance("ties", {}, base, apart, None, expert_id="a", state_in=None, state_out=states[0])
    out = tmp_path / "stream.safetensors"
    advance("ties", {}, base, tied, out, expert_id="b", state_in=states[0], state_out=states[1])
    merge("ties", {}, base, [apart, tied], tmp_path / "all.safetensors", ids=["a", "b"])
    assert out.read_bytes() == (tmp_path / "all.safetensors").read_bytes()
