"""Common model families, as their libraries save them: towers and depths, in a table of docs/merging.md."""

import json
from pathlib import Path

import pytest

from merge_service.anatomy import ByName, anatomy_of, described
from merge_service.checkpoints import Checkpoint
from merge_service.merge import merge
from tests.merge_service.families import FAMILIES
from tests.merge_service.toys import load, save

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[test]'")
PAGE = Path(__file__).parents[3] / "docs" / "merging.md"
BEGIN = "| family (tiny) | towers: stacks (blocks) | numbered, but no blocks |\n|---|---|---|\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("families")
    made = {family: room / family.replace(" ", "-") for family in FAMILIES}
    for family, path in made.items():
        path.mkdir()
        FAMILIES[family](path)
    return made


def anatomy(path: Path) -> ByName:
    with Checkpoint.open(path) as checkpoint:
        return anatomy_of({name: info.shape for name, info in checkpoint.tensors.items()})


def row(family: str, found: ByName) -> str:
    stacks = "; ".join(
        f"{tower}: " + ", ".join(f"`{name}` ({depth})" for name, depth in sorted(stacks.items()))
        for tower, stacks in found.stacks.items()
    )
    return f"| {family} | {stacks} | {', '.join(f'`{name}`' for name in found.sequences)} |"


def test_table_of_the_page_is_what_the_names_say(models: dict[str, Path]) -> None:
    table = BEGIN + "\n".join(row(family, anatomy(path)) for family, path in models.items()) + "\n"
    assert table in PAGE.read_text(), f"docs/merging.md should hold\n{table}"


def depth_of(config: dict, *keys: str) -> int:
    found = [value for key in keys if (value := config.get(key)) is not None]
    return sum(found[0]) if isinstance(found[0], list) else found[0]


LAYERS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "depth", "n_layer", "n_layers", "depths", "num_layers")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_of_every_stack_is_what_the_configuration_says(models: dict[str, Path], family: str) -> None:
    found = anatomy(models[family])
    assert not found.unclear
    config_file = models[family] / "config.json"
    if not config_file.is_file():
        assert all(stacks for stacks in found.stacks.values())
        return
    config = json.loads(config_file.read_text())
    text, vision = config.get("text_config", config), config.get("vision_config")
    expected = {"model": depth_of(text, *LAYERS)}
    if vision:
        expected = {"image": depth_of(vision, *LAYERS), "text": expected["model"]}
    elif "decoder" in found.stacks:
        expected = {"decoder": expected["model"], "encoder": depth_of(config, "encoder_layers", "num_layers")}
    assert {tower: list(stacks.values()) for tower, stacks in found.stacks.items()} == {
        tower: [depth] for tower, depth in expected.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_lines_grows_from_alpha_to_alpha_and_beta_over_every_stack(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    base, found = load(models[family]), anatomy(models[family])
    floats = [name for name, value in base.items() if value.dtype.kind == "f"]
    zero = {name: value * 0 if name in floats else value for name, value in base.items()}
    one = {name: value * 0 + 1 if name in floats else value for name, value in base.items()}
    files = [save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in (("b", zero), ("e", one))]
    merge("lines", {"lines_alpha": 0.25, "lines_beta": 0.5}, files[0], files[1:], tmp_path / "o.safetensors")
    factors = {name: set(value.ravel().tolist()) for name, value in load(tmp_path / "o.safetensors").items()}
    for name in floats:
        if name.endswith(("running_mean", "running_var")):
            continue
        stack, number = found.block.get(name, ("", 0))
        last = {s: d for stacks in found.stacks.values() for s, d in stacks.items()}.get(stack, 1) - 1
        assert [*factors[name]] == [pytest.approx(0.25 + 0.5 * number / max(last, 1), abs=1e-2)], (
            name,
            described(found.stacks),
        )
