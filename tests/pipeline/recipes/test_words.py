"""Vocabularies that differ: mergekit's numbers row by row, tied and untied pairs, tokenizers that open, refusals.

`tests/golden/mergekit_words.safetensors` holds mergekit's results, made by `reference_words.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from merge_service.checkpoints import Checkpoint
from merge_service.errors import UserError
from merge_service.merge import MergeReport
from pipeline.recipes.carry_out import Output, merge_recipe
from pipeline.recipes.read import read_recipe
from tests.pipeline.recipes.worded import RECIPES, WORDS, by_token, write_worded
from tests.world import ROOT

GOLDEN = ROOT / "tests" / "golden" / "mergekit_words.safetensors"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_worded(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def carry_out(text: str, out: str = "out") -> MergeReport:
    Path("recipe.yaml").write_text(text)
    return merge_recipe(read_recipe(Path("recipe.yaml")).recipe, Output(Path(out)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_over_vocabularies_gives_the_numbers_of_mergekit(recipe: str, room: Path) -> None:
    wanted = {
        key.partition(":")[2]: values
        for key, values in load_file(GOLDEN).items()
        if key.startswith(f"{recipe}:")
    }
    carry_out(RECIPES[recipe])
    found = by_token(room / "out")
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6, err_msg=name)


def test_recipe_of_ours_says_the_same_and_can_be_made_again(room: Path) -> None:
    carry_out(RECIPES["overridden"])
    again = yaml.safe_load((room / "out" / "merge.yaml").read_text())
    assert again["tokenizer"]["tokens"]["w5"] == {"source": str(room / "b"), "force": True}
    merge_recipe(read_recipe(room / "out" / "merge.yaml").recipe, Output(Path("again")))
    for name, values in by_token(room / "out").items():
        assert np.array_equal(by_token(room / "again")[name], values)


def test_output_opens_and_answers_as_the_merge_in_torch(room: Path) -> None:
    transformers = pytest.importorskip("transformers")
    carry_out("technique: average\nbase: base\nexperts: [base, tied]\ntokenizer: union\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer.convert_tokens_to_ids(["w3", "<a>"]) == [6, 14] and len(tokenizer) == 15
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert model.config.vocab_size == 15
    base, tied = by_token(room / "base"), by_token(room / "tied")
    for name, values in model.state_dict().items():
        if "embed" not in name and "head" not in name:
            torch.testing.assert_close(values, torch.from_numpy((base[name] + tied[name]) / 2))
    rows = model.get_output_embeddings().weight.detach().numpy()
    embedded = "model.embed_tokens.weight"
    np.testing.assert_allclose(rows[6], (base["lm_head.weight|w3"] + tied[f"{embedded}|w3"]) / 2, rtol=1e-6)
    np.testing.assert_allclose(rows[14], tied[f"{embedded}|<a>"], rtol=1e-6)


def test_models_that_are_all_tied_stay_tied(room: Path) -> None:
    for name in ("base", "b"):
        held = load_file(room / name / "model.safetensors")
        save_file(
            {key: one for key, one in held.items() if key != "lm_head.weight"},
            room / name / "model.safetensors",
        )
        config = json.loads((room / name / "config.json").read_text())
        (room / name / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    carry_out("technique: task_arithmetic\nbase: base\nexperts: [tied, b]\ntokenizer: union\n")
    assert "lm_head.weight" not in load_file(room / "out" / "model.safetensors")
    assert len(load_file(room / "out" / "model.safetensors")["model.embed_tokens.weight"]) == len(WORDS) + 2


def test_token_of_one_expert_keeps_its_row_under_task_vectors(room: Path) -> None:
    carry_out(
        "technique: ties\nbase: base\nexperts: [a, b]\nparameters: {granularity: tensor}\ntokenizer: union\n"
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for model, token in (("a", "<a>"), ("b", "<b>")):
            assert np.array_equal(
                by_token(room / "out")[f"{name}|{token}"], by_token(room / model)[f"{name}|{token}"]
            )


def test_tokenizer_of_another_model_moves_the_ids_of_special_tokens(room: Path) -> None:
    tree = json.loads((room / "b" / "tokenizer.json").read_text())
    tree["model"]["vocab"] |= {"<s>": 2, "</s>": 1}
    for one in tree["added_tokens"]:
        one["id"] = tree["model"]["vocab"][one["content"]]
    (room / "b" / "tokenizer.json").write_text(json.dumps(tree))
    carry_out("technique: average\nexperts: [a, b]\ntokenizer: b\n")
    config = json.loads((room / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (14, 2, 1)
    assert (room / "out" / "tokenizer.json").read_bytes() == (room / "b" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("wanted", "found"), [("auto", "of two"), ('"{{ messages }}"', "{{ messages }}")])
def test_chat_template_is_the_most_common_one_or_the_text_given(room: Path, wanted: str, found: str) -> None:
    (room / "a" / "chat_template.jinja").write_text("of one")
    for name in ("b", "base"):
        said = json.loads((room / name / "tokenizer_config.json").read_text())
        (room / name / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": "of two"}))
    models = "[{model: base, parameters: {weight: 1}}, {model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]"
    carry_out(
        f"merge_method: linear\nmodels: {models}\nbase_model: base\ntokenizer_source: base\nchat_template: {wanted}\n"
    )
    assert (room / "out" / "chat_template.jinja").read_text() == found
    assert "chat_template" not in json.loads((room / "out" / "tokenizer_config.json").read_text())


def test_equal_vocabularies_give_the_bytes_of_a_merge_without_a_tokenizer(room: Path) -> None:
    carry_out("technique: average\nexperts: [a, a]\ntokenizer: base\n", "named")
    carry_out("technique: average\nexperts: [a, a]\n", "plain")
    for name, values in load_file(room / "plain" / "model.safetensors").items():
        assert np.array_equal(load_file(room / "named" / "model.safetensors")[name], values)


def test_head_of_another_size_is_named(room: Path) -> None:
    held = load_file(room / "b" / "model.safetensors")
    save_file({**held, "lm_head.weight": held["lm_head.weight"][:-2]}, room / "b" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"lm_head.weight has shape \[12, 4\], but model.embed_tokens.weight has 14 rows"
    ):
        carry_out(RECIPES["union"])
    assert not (room / "out").exists()


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("nowhere", "nowhere has no tokenizer.json"),
        ("{tokens: {<a>: {source: c}}}", "c is no model of this merge"),
        (
            "{tokens: {<a>: {source: {kind: model_token, model: base, token: none}}}}",
            "does not have the token 'none'",
        ),
        (
            "{tokens: {<a>: {source: {kind: model_token, model: base, token_id: 99}}}}",
            "does not have a row 99",
        ),
        ("{tokens: {<a>: {source: {kind: model_token, model: base}}}}", "either token or token_id"),
        ("{padding: 8}", "padding"),
    ],
)
def test_mistakes_about_tokens_are_refused(room: Path, tokenizer: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        carry_out(f"technique: average\nbase: base\nexperts: [base, a]\ntokenizer: {tokenizer}\n")
    assert not (room / "out").exists()


def test_model_without_a_tokenizer_is_refused_if_its_rows_could_mean_anything(room: Path) -> None:
    (room / "b" / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"b has no tokenizer\.json, so the meaning of its 14 rows is unknown"
    ):
        carry_out(RECIPES["union"])


def test_rows_that_are_read_in_parts_are_those_of_the_whole(room: Path) -> None:
    from merge_service.checkpoints.views.rows import Reworded, Rows

    with Checkpoint.open("a") as a, Checkpoint.open("b") as b:
        rows = Rows((3, -1, 4, 5, -1, -1), {1: ((Path("b"), 2), (Path("b"), 3)), 4: ()})
        seen = Reworded(a, rows, {Path("b"): b})
        name = "lm_head.weight"
        whole = seen.read(name)
        assert np.array_equal(np.concatenate([seen.read(name, at, at + 5) for at in range(0, 24, 5)]), whole)
        own, other = a.read(name).reshape(-1, 4), b.read(name).reshape(-1, 4)
        known = np.stack([own[3], (other[2] + other[3]) / 2, own[4], own[5], np.zeros(4, np.float32)])
        np.testing.assert_allclose(whole.reshape(6, 4)[:5], known, rtol=1e-6)
        np.testing.assert_allclose(whole.reshape(6, 4)[5], known.mean(0), rtol=1e-6)
