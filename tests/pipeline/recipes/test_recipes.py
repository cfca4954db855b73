"""Our own recipes: what they may say, what they mean for tensors, and mistakes that name what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from merge_service.errors import UserError
from pipeline.merging.files import Execution
from pipeline.recipes.carry_out import Output, merge_recipe
from pipeline.recipes.read import read_recipe
from pipeline.recipes.settings import chained, rules, value_at, written
from tests.pipeline.recipes.tiny import CONFIG, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("models")
    write_models(room)
    return room


@pytest.fixture
def carried(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a recipe, carries it out beside the models, and reads the result."""

    def carry(text: str, **options: object) -> dict[str, np.ndarray]:
        monkeypatch.chdir(models)
        (tmp_path / "recipe.yaml").write_text(text)
        recipe = read_recipe(tmp_path / "recipe.yaml").recipe
        merge_recipe(recipe, Output(tmp_path / "out", **options))  # type: ignore[arg-type]
        return load_file(tmp_path / "out" / "model.safetensors")

    return carry


def weights(models: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(models / name / "model.safetensors")


@pytest.mark.parametrize(
    "setting, name, t, value",
    [
        (0.5, "w", 0.3, 0.5),
        ([0, 1], "w", 0.25, 0.25),
        ([1, 0.5, 0], "w", 0.75, 0.25),
        ([True, False], "w", 0.9, True),
        ({"filter": "mlp", "value": 2}, "layers.0.mlp.w", 0, 2),
        ({"filter": "mlp", "value": 2}, "layers.0.attn.w", 0, None),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 7}], "mlp", 0.5, 2),
        ([{"filter": "mlp", "value": [0, 4]}, {"filter": "*", "value": 7}], "attn", 0.5, 7),
        (None, "w", 0, None),
    ],
)
def test_setting_has_this_value_for_a_tensor(setting, name: str, t: float, value) -> None:
    assert value_at(rules(setting), name, t) == value
    assert value_at(rules(written(rules(setting))), name, t) == value


@pytest.mark.parametrize(
    "setting", [{"filter": "mlp"}, {"valeu": 1}, [1, {"value": 2}], [[1]], {"filter": 3, "value": 1}]
)
def test_value_that_is_no_setting_is_refused(setting) -> None:
    with pytest.raises(ValueError):
        rules(setting)


def test_earlier_setting_takes_precedence_where_it_has_a_value() -> None:
    found = chained({"filter": "mlp", "value": 1}, 2, 3)
    assert [value_at(found, name, 0) for name in ("mlp", "attn")] == [1, 2]


def test_experts_weights_and_filters_of_an_average_are_those_written(carried, models: Path) -> None:
    made = carried(
        "technique: average\nexperts: [{model: a, weight: 1}, {model: b, weight: [{filter: mlp, value: 3}, {value: 1}]}]"
    )
    a, b = weights(models, "a"), weights(models, "b")
    for name in made:
        share = 0.75 if "mlp" in name else 0.5
        np.testing.assert_allclose(made[name], (1 - share) * a[name] + share * b[name], rtol=1e-5, atol=1e-6)


def test_election_without_normalizing_takes_a_negative_weight(carried, models: Path) -> None:
    made = carried(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: -1, density: 1}}]\nparameters: {normalize: false}"
    )
    a, base = weights(models, "a"), weights(models, "base")
    for name in made:
        np.testing.assert_allclose(made[name], 2 * base[name] - a[name], rtol=1e-5, atol=1e-6)


def test_uniform_recipe_gives_the_bytes_of_the_merge_of_files(carried, models: Path, tmp_path: Path) -> None:
    from merge_service.merge import merge

    made = carried("technique: ties\nbase: base\nexperts: [a, b]\nparameters: {density: 0.3}")
    merge(
        "ties", {"density": 0.3}, models / "base", [models / "a", models / "b"], tmp_path / "file.safetensors"
    )
    straight = load_file(tmp_path / "file.safetensors")
    assert {name: one.tobytes() for name, one in made.items()} == {
        name: one.tobytes() for name, one in straight.items()
    }


def test_tensors_that_a_filter_sets_apart_have_the_bytes_of_a_whole_merge(
    carried, models: Path, tmp_path: Path
) -> None:
    from merge_service.merge import merge

    made = carried(
        "technique: ties\nbase: base\nexperts: [a, b]\nparameters: {granularity: tensor, density: [{filter: mlp, value: 0.3}, {value: 0.7}]}"
    )
    for density, inside in ((0.3, True), (0.7, False)):
        out = tmp_path / f"{density}.safetensors"
        merge(
            "ties",
            {"density": density, "granularity": "tensor"},
            models / "base",
            [models / "a", models / "b"],
            out,
        )
        whole = load_file(out)
        assert all(
            made[name].tobytes() == whole[name].tobytes() for name in made if ("mlp" in name) is inside
        )


def test_expert_of_weight_zero_takes_no_part_and_without_others_the_base_stays(carried, models: Path) -> None:
    made = carried(
        "technique: task_arithmetic\nbase: base\nexperts: [{model: a, weight: [{filter: mlp, value: 0.5}, {value: 0}]}]\nparameters: {scale: 1}"
    )
    a, base = weights(models, "a"), weights(models, "base")
    assert all(made[name].tobytes() == base[name].tobytes() for name in made if "mlp" not in name)
    for name in made:
        if "mlp" in name:
            np.testing.assert_allclose(made[name], (a[name] + base[name]) / 2, rtol=1e-5, atol=1e-6)


def test_slices_number_layers_anew_and_the_configuration_says_so(
    carried, models: Path, tmp_path: Path
) -> None:
    made = carried(
        "technique: average\nslices: [{experts: [{model: a, layers: [0, 3]}]}, {experts: [{model: deep, layers: [2, 6], factor: 2}]}]"
    )
    a, deep = weights(models, "a"), weights(models, "deep")
    part = "self_attn.q_proj.weight"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 7
    assert made[f"model.layers.2.{part}"].tobytes() == a[f"model.layers.2.{part}"].tobytes()
    np.testing.assert_array_equal(made[f"model.layers.3.{part}"], 2 * deep[f"model.layers.2.{part}"])
    assert made["model.embed_tokens.weight"].tobytes() == a["model.embed_tokens.weight"].tobytes()
    np.testing.assert_array_equal(made["lm_head.weight"], 2 * deep["lm_head.weight"])


def test_list_with_an_entry_for_each_layer_follows_the_layers(tmp_path: Path, models: Path) -> None:
    room = tmp_path / "typed"
    room.mkdir()
    save_file(weights(models, "a"), room / "model.safetensors")
    config = {**CONFIG, "num_hidden_layers": 4, "layer_types": ["s", "s", "s", "f"]}
    (room / "config.json").write_text(json.dumps({"text_config": config}))
    (tmp_path / "r.yaml").write_text(
        f"technique: average\nslices: [{{experts: [{{model: {room}, layers: [3, 4]}}]}}, {{experts: [{{model: {room}, layers: [0, 2]}}]}}]"
    )
    merge_recipe(read_recipe(tmp_path / "r.yaml").recipe, Output(tmp_path / "out"))
    said = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (said["num_hidden_layers"], said["layer_types"]) == (3, ["f", "s", "s"])


def test_chain_uses_an_earlier_merge_by_its_name(carried, models: Path) -> None:
    made = carried(
        "merges:\n- {name: ab, technique: average, experts: [a, b]}\n- {technique: average, experts: [{model: ab, weight: 2}, {model: c, weight: 1}]}"
    )
    a, b, c = (weights(models, name) for name in "abc")
    for name in made:
        np.testing.assert_allclose(made[name], (a[name] + b[name] + c[name]) / 3, rtol=1e-5, atol=1e-6)


def test_dtype_of_the_recipe_is_written_and_an_option_takes_precedence(carried, models: Path) -> None:
    text = (
        "technique: average\nexperts: [{model: a, weight: [0.5, 1]}, {model: b, weight: 1}]\ndtype: float16"
    )
    assert carried(text)["lm_head.weight"].dtype == np.float16
    assert carried(text, dtype="float64")["lm_head.weight"].dtype == np.float64


def test_card_and_recipe_say_how_the_model_was_made(carried, tmp_path: Path) -> None:
    carried("technique: ties\nbase: base\nexperts: [a, b]")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "base_model": ["base", "a", "b"],
        "library_name": "transformers",
        "tags": ["merge", "temporal-merge", "ties"],
    }
    assert str(tmp_path) not in card and "technique: ties" in card
    assert all(
        Path(path).is_absolute()
        for path in yaml.safe_load((tmp_path / "out" / "merge.yaml").read_text())["experts"]
    )


@pytest.mark.parametrize(
    "text, said",
    [
        ("technique: tise\nexperts: [a]", "ties"),
        ("technqiue: ties\nexperts: [a]", "did you mean technique"),
        ("technique: ties\nbase: base\nexpert: [a]", "experts"),
        ("technique: ties\nbase: base\nexperts: [{model: a, wieght: 1}]", "weight"),
        ("technique: ties\nbase: base\nexperts: [a]\nparameters: {densty: 0.5}", "density"),
        ("technique: ties\nbase: base\nexperts: [a]\nparameters: {density: 7}", "density = 7"),
        ("technique: ties\nbase: base\nexperts: [a, b]\nparameters: {density: [0.5, 1]}", "set granularity: tensor"),
        ("technique: lines_ties\nbase: base\nexperts: [a, b]\nparameters: {granularity: tensor, scale: 1}\nslices: []", "scale"),
        ("technique: average\nexperts: [a]\nslices: [{experts: [{model: a, layers: [0, 1]}]}]", "one of the three"),
        ("technique: average\nslices: [{experts: [{model: a}]}]", "layers"),
        ("technique: average\nslices: [{experts: [{model: a, layers: [0, 9]}]}]", "0 to 4"),
        ("technique: average\nslices: [{experts: [{model: a, layers: [0, 2]}, {model: b, layers: [0, 3]}]}]", "equally many"),
        ("technique: average\nexperts: [a, nowhere]", "nowhere"),
        ("technique: average\nexperts: [a, b]\nparameters: {weights: [1, 2]}", "each expert its own"),
        ("technique: average\nexperts: [a, b]\ndtype: int4", "float32"),
        ("technique: average\nmodules: {encoder: {experts: [a, b]}}", "belongs to the module 'encoder'"),
        ("technique: average\nmodules: {lm_head: {experts: [a, b]}}", "belong to no module"),
        ("merges: [{technique: average, experts: [a]}, {technique: average, experts: [b]}]", "has no name"),
        ("", "empty"),
        ("technique: average\nexperts: [a]\n---\n- 1", "must hold a mapping"),
        ("technique: breadcrumbs\nbase: base\nexperts: [{model: a, outliers: 0.01}, {model: b, outliers: 0.02}]", "one outliers for all experts"),
        ("technique: magmax\nbase: base\nexperts: [{model: a, weight: 1}, {model: b, weight: 2}]", "no weights of experts"),
        ("merge_method: ties\nmodels: [{model: a}]\nparameters: {densty: 1}", "density"),
        ("merge_method: teis\nmodels: [{model: a}]", "did you mean ties"),
        ("merge_method: ties\nmodel: [{model: a}]", "models"),
        ("merge_method: ties\nmodels: [{model: a}]", "needs a base_model"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {t: 1}", "takes 2 models"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]", "no t"),
        ("merge_method: linear\nmodels: [{model: a}, {model: b}]", "has no weight"),
        ("merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: -1}}, {model: b, parameters: {weight: 1}}]", "set normalize: false"),
        ("technique: ties\nbase: base\nslices: [{experts: [{model: a, layers: [0, 4]}, {model: b, layers: [0, 4]}]}]\nparameters: {granularity: tensor}", "in slices, with its layers"),
        ("technique: average\nslices: [{experts: [{model: a, layers: [0, 4]}]}]\nparameters: {logit_scale: base}", "logit_scale = base needs the base"),
        ("technique: average\nexperts: [{model: a, weight: 1}, b]", "an expert has no weight; give one"),
        ("merge_method: dare_ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: [1, -1]}}]\nparameters: {normalize: true}", "set normalize: false"),
        ("merge_method: linear\nmodels: [{model: org/name@main, parameters: {weight: 1}}]", "revision"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]", "exactly one"),
    ],
)  # fmt: skip
def test_mistake_in_a_recipe_names_what_to_write(carried, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        carried(text)
    assert said in str(caught.value)


def test_parts_cannot_be_divided_among_workers(models: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "r.yaml").write_text(
        "technique: average\nexperts: [{model: a, weight: [0, 1]}, {model: b, weight: 1}]"
    )
    with pytest.raises(UserError, match="leave --workers out"):
        merge_recipe(read_recipe(tmp_path / "r.yaml").recipe, Output(tmp_path / "out"), Execution(workers=2))
