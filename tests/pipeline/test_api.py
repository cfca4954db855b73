"""The Python API gives the answers of the command line, and merges state dicts like files, bit for bit."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import temporal_merge as tm
from merge_service.checkpoints import Checkpoint, CheckpointWriter, InMemory
from merge_service.errors import UserError
from merge_service.techniques import get, names
from pipeline.plan.file import write as write_plan
from pipeline.report.notebook import as_html, bar_of_notebook
from pipeline.run.progress import Moment
from tests.merge_service.toys import Files, load
from tests.pipeline.tracked_study import finished_study
from tests.world import ROOT, TASKS, World


def test_import_and_reading_of_names_load_no_heavy_library() -> None:
    code = "import sys, temporal_merge as tm; tm.merge, tm.Run; print([m for m in ('torch', 'ray', 'mlflow', 'pandas') if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_every_listed_name_exists_and_no_other() -> None:
    for name in tm.__all__:
        assert getattr(tm, name) is not None
    assert tm.UserError is UserError
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tm.nonsense


def test_techniques_are_those_of_the_command(cli) -> None:
    assert tm.techniques() == json.loads(cli("techniques", "--json").out)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("technique", [name for name in names() if not get(name).evidence])
def test_state_dicts_give_the_bits_of_files_for_every_technique(
    technique: str, kind: str, tmp_path: Path
) -> None:
    files = Files(tmp_path)
    tm.merge(technique, files.paths, base=files.start, out=files.out)
    as_given = (lambda a: a) if kind == "numpy" else (lambda a: torch.from_numpy(np.array(a)))
    base, *experts = [{k: as_given(v) for k, v in m.items()} for m in (files.base, *files.experts)]
    merged = tm.merge(technique, experts, base=base)
    expected = load(files.out)
    assert list(merged) == list(base)
    for name, value in merged.items():
        assert isinstance(value, np.ndarray if kind == "numpy" else torch.Tensor)
        assert value.dtype == base[name].dtype
        assert np.asarray(value).tobytes() == expected[name].tobytes(), name
        assert value.shape == base[name].shape


def test_state_dicts_are_read_in_place_and_no_file_is_written_or_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(
        '{"quantization_config": {"quant_method": "gptq"}, "num_attention_heads": 2}'
    )
    (tmp_path / "expert-1.fisher.safetensors").write_bytes(b"no statistics")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: pytest.fail("a temporary folder was asked for"))
    (tmp_path / "elsewhere").mkdir()
    files = Files(tmp_path / "elsewhere")
    copies = [{k: np.array(v) for k, v in one.items()} for one in (files.base, *files.experts)]
    for value in (value for one in copies for value in one.values()):
        value.flags.writeable = False
    for technique in ("ties", "iso_c", "dare", "slerp"):
        tm.merge(technique, copies[1:3], base=copies[0])
    with pytest.raises(
        UserError, match=r"fisher needs statistics of kind fisher of expert-1; give .*statistics=\["
    ):
        tm.merge("fisher", copies[1:3], base=copies[0])
    assert [one for one in sorted(tmp_path.iterdir()) if one.name != "elsewhere"] == before


def test_tensors_that_lie_otherwise_than_in_a_file_merge_to_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    plain = [
        {"a": rng.normal(size=(6, 4)).astype(np.float32), "b": rng.normal(size=9).astype(np.float16)}
        for _ in range(3)
    ]
    turned = [{"a": np.asfortranarray(one["a"]), "b": np.repeat(one["b"], 2)[::2]} for one in plain]
    strided = [{k: torch.from_numpy(v.copy()).flip(0).flip(0)[:] for k, v in one.items()} for one in turned]
    strided[1]["a"] = torch.from_numpy(plain[1]["a"].T.copy()).t()
    wanted = tm.merge("ties", plain[1:], base=plain[0], density=0.5)
    for models in (turned, strided):
        for name, value in tm.merge("ties", models[1:], base=models[0], density=0.5).items():
            assert np.asarray(value).tobytes() == np.asarray(wanted[name]).tobytes(), name


def test_weights_in_memory_are_named_and_hashed_as_the_file_of_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.normal(size=(3, 5)).astype(np.float16),
        "a": rng.normal(size=900).astype(np.float32),
        "none": np.zeros((0, 2), np.float32),
    }
    layout = {name: ({2: "F16", 4: "F32"}[one.itemsize], one.shape) for name, one in arrays.items()}
    held = InMemory(
        Path("one"), layout, {name: one.reshape(-1) for name, one in arrays.items()}, {"format": "pt"}
    )
    with CheckpointWriter(tmp_path / "one.safetensors", layout, {"format": "pt"}) as writer:
        for name, one in arrays.items():
            writer.write_stored(name, 0, one.reshape(-1))
    with Checkpoint.open(tmp_path / "one.safetensors") as file:
        assert held.digests() == file.digests()
        for name in arrays:
            np.testing.assert_array_equal(held.read(name), file.read(name))
            np.testing.assert_array_equal(held.raw(name, 1, 4), file.raw(name, 1, 4))
        assert held.rename("a", "c") == 1
        np.testing.assert_array_equal(held.read("c", 5, 9), arrays["a"][5:9])
    assert held.address("c") == arrays["a"].ctypes.data


def test_torch_state_dicts_in_half_precision_give_the_bits_of_files_and_stay_as_they_were(
    tmp_path: Path,
) -> None:
    random = torch.Generator().manual_seed(0)
    models = [
        {
            "a": torch.randn(5, 3, generator=random).to(torch.bfloat16),
            "b": torch.randn(7, generator=random).half(),
        }
        for _ in range(3)
    ]
    models[1]["a"] = models[1]["a"].t().contiguous().t()  # the same numbers, laid out the other way
    models[2]["b"] = torch.nn.Parameter(models[2]["b"])
    before = [{k: v.detach().clone() for k, v in model.items()} for model in models]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, model in zip(paths, before):
        save_torch({k: v.contiguous() for k, v in model.items()}, path)
    tm.merge("ties", paths[1:], base=paths[0], out=tmp_path / "out.safetensors", density=0.5)
    merged = tm.merge("ties", models[1:], base=models[0], density=0.5)
    for name, value in load_torch(tmp_path / "out.safetensors").items():
        assert merged[name].dtype == value.dtype and torch.equal(merged[name], value)
        assert all(torch.equal(m[name], b[name]) for m, b in zip(models, before))


@pytest.mark.parametrize("technique", ["dare", "random_mix", "dare_ties"])
def test_state_dicts_and_files_of_the_same_tensors_get_the_same_random_masks(
    technique: str, tmp_path: Path
) -> None:
    files = Files(tmp_path)
    params = {} if technique == "random_mix" else {"density": 0.5}
    tm.merge(technique, files.paths, base=files.start, out=files.out, **params)  # type: ignore[arg-type]
    experts = [dict(reversed(one.items())) for one in files.experts]
    merged = tm.merge(technique, experts[::-1], base=files.base, **params)  # type: ignore[arg-type]
    for name, value in load(files.out).items():
        np.testing.assert_array_equal(merged[name], value)  # type: ignore[index]


def test_state_dicts_of_eight_bit_floats_come_back_as_such() -> None:
    random = torch.Generator().manual_seed(0)
    one, two = ({"w": torch.randn(4, 4, generator=random).to(torch.float8_e4m3fn)} for _ in range(2))
    merged = tm.merge("average", [one, two])
    expected = ((one["w"].float() + two["w"].float()) / 2).to(torch.float8_e4m3fn)
    assert merged["w"].dtype == torch.float8_e4m3fn and torch.equal(merged["w"].float(), expected.float())


def test_state_dicts_without_numbers_are_called_what_they_are() -> None:
    whole = {"w": torch.zeros(2, 2)}
    for says, one in {
        "meta device": {"w": torch.zeros(2, 2, device="meta")},
        "sparse .*to_dense": {"w": torch.eye(2).to_sparse()},
        "quantised; .*dequantize": {"w": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)},
        "'state_dict' is a dict itself": {"epoch": torch.tensor(3), "state_dict": whole},
        "give its state_dict": torch.nn.Linear(2, 2),
        "0 is no name of a tensor": {0: torch.zeros(2, 2)},
    }.items():
        with pytest.raises(UserError, match=f"expert-2.*{says}"):
            tm.merge("average", [whole, one])


def test_state_dicts_merge_over_a_prefix_and_from_any_base_when_asked() -> None:
    rng = np.random.default_rng(0)
    one, two = ({"w": rng.normal(size=(16, 16)).astype(np.float32)} for _ in range(2))
    with pytest.raises(UserError, match="any_base=True"):
        tm.merge("average", [one, two])
    merged = tm.merge("average", [{"module.w": one["w"]}, two], strip_prefix="module.", any_base=True)
    np.testing.assert_allclose(merged["w"], (one["w"] + two["w"]) / 2, atol=1e-6)  # type: ignore[index]


def test_merge_refuses_what_cannot_be_meant(tmp_path: Path) -> None:
    files = Files(tmp_path)
    one = {"w": np.zeros(2, np.float32)}
    for match, arguments in {
        "list of checkpoints": {"experts": files.paths[0]},
        "needs out": {"experts": files.paths},
        "leave it out": {"experts": [one], "out": files.out},
        "all files, or all state dicts": {"experts": [files.paths[0], one], "out": files.out},
        "one of the inputs": {"experts": files.paths, "out": files.paths[0]},
        "expert-1: 'w' is complex64": {"experts": [{"w": np.zeros(2, np.complex64)}]},
        "expert-1: 'w' is list": {"experts": [{"w": [1.0]}]},
        "expert-2 is a list, not a state dict": {"experts": [one, [1]]},
        "no parameter 'densty'": {"experts": [one], "densty": 0.5},
        "nothing to merge": {"experts": [], "out": files.out},
        "list of checkpoints, even of one": {"experts": 3},
        "needs out, the file": {"experts": files.paths, "out": ""},
        "any_base = 'no' is not true or false": {"experts": [one], "any_base": "no"},
        "strip_prefix = 3 is not text": {"experts": [one], "strip_prefix": 3},
        "ids = 'ab' is not a list": {"experts": [one, one], "ids": "ab"},
        r"ids = \['', 'b'\] is not a list": {"experts": [one, one], "ids": ["", "b"]},
    }.items():
        with pytest.raises(UserError, match=match):
            tm.merge("average", **arguments)
    table = tmp_path / "table.json"
    table.write_text('{"*": [1, 1], "*": [0, 1]}')
    with pytest.raises(UserError, match=r"the key '\*' is given twice"):
        tm.merge("task_arithmetic", [one, one], one, coefficients=table)
    assert tm.merge("average", iter([one, one]))["w"].tolist() == [0, 0]  # type: ignore[index]
    with pytest.raises(UserError, match="expert-2"):
        tm.merge("average", [one, {"w": np.full(2, np.nan, np.float32)}])


def test_plan_of_a_study_is_that_of_the_command(world: World, tmp_path: Path, cli) -> None:
    path = world.study()
    study = tm.load_study(path, ["grid.seed=[0,1]"])
    arguments = ["plan", path, "--set", "grid.seed=[0,1]", "--out", tmp_path / "out", "--json"]
    assert tm.plan(study, tmp_path / "out") == json.loads(cli(*arguments).out)
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_finished_run_is_read_as_results_json_says_it(undisturbed: Path) -> None:
    run = tm.open_run(str(undisturbed))
    assert run.results == json.loads((undisturbed / "results.json").read_text())
    assert len(run.frame()) == 3 * (1 + len(TASKS)) and len(run.scores()) == 3 * 4 * 4
    for one in run.results["trajectories"]:
        for step in one["steps"]:
            record = json.loads((run.checkpoint(one["id"], step["t"]) / "record.json").read_text())
            held = record["files"]["open_clip_model.safetensors"]["sha256"]
            assert held == step["deployed_sha256"]
    for metric in ("ka", "zs", "gm", "bwt"):
        best = run.best(by=metric)
        ends = [one["steps"][-1][metric] for one in run.results["trajectories"]]
        assert best[metric] == max(ends) and best["t"] == len(TASKS)


@pytest.mark.ray
def test_run_without_results_or_with_those_of_another_plan_is_read_from_its_store(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    expected = tm.open_run(undisturbed).results
    (out / "results.json").write_text(json.dumps(expected | {"plan": "other", "trajectories": []}))
    assert tm.open_run(out).results == expected
    (out / "results.json").unlink()
    assert tm.open_run(out).results == expected
    one = next(one for one in expected["trajectories"] if one["id"].startswith("best_in_time"))
    shutil.rmtree(tm.open_run(out).checkpoint(one["id"], 3))
    with pytest.raises(UserError, match="run the study again"):
        tm.open_run(out).checkpoint(one["id"], 3)
    shutil.rmtree(out / "store" / "evaluate")
    with pytest.raises(UserError, match="to its end"):
        tm.open_run(out).best()


@pytest.mark.ray
def test_mistakes_about_a_run_say_what_there_is(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        tm.open_run(tmp_path)
    run = tm.open_run(undisturbed)
    name = run.best()["trajectory"]
    with pytest.raises(UserError, match=f"did you mean {re.escape(name)}"):
        run.checkpoint(name[:-1], 1)
    with pytest.raises(UserError, match="it has 0, 1, 2, 3"):
        run.checkpoint(name, 4)
    with pytest.raises(UserError, match="choose one of ka, zs, gm, bwt"):
        run.best(by="loss")


@pytest.mark.ray
def test_checkpoint_of_the_best_scores_what_the_run_says(undisturbed: Path, world: World) -> None:
    run = tm.open_run(undisturbed)
    best = run.best()
    again = tm.evaluate(run.checkpoint(best["trajectory"], best["t"]), tm.load_study(world.study()))
    assert again["gm"] == best["gm"]


def test_state_dict_that_shares_one_tensor_under_two_names_stays_so() -> None:
    def model(seed: int, tie: bool = True) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        embed = torch.randn(9, 5)
        return {
            "lm_head.weight": embed if tie else torch.randn(9, 5),
            "embed.weight": embed,
            "w": torch.randn(3),
        }

    merged = tm.merge("dare", [model(1), model(2)], model(0))
    assert merged["lm_head.weight"] is merged["embed.weight"]
    copies = [{name: value.clone() for name, value in model(seed).items()} for seed in range(3)]
    again = tm.merge("dare", copies[1:], copies[0])
    assert torch.equal(again["lm_head.weight"], merged["lm_head.weight"]) and torch.equal(
        again["embed.weight"], merged["embed.weight"]
    )
    assert again["lm_head.weight"] is not again["embed.weight"]
    apart = tm.merge("dare", [model(1), model(2, tie=False)], model(0))
    assert not torch.equal(apart["lm_head.weight"], apart["embed.weight"])


# --- runs, notebooks, messages ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tm.Run:
    """A run with invented results."""
    study = finished_study(
        tmp_path_factory.mktemp("out"), strategies=("zero_shot", "best_in_time"), tasks=("animals", "scripts")
    )
    write_plan(study.plan, study.out / "plan.json")
    return tm.open_run(study.out)


def test_run_says_how_it_stands_and_whether_its_artifacts_are_whole(finished: tm.Run, tmp_path: Path) -> None:
    assert finished.status()["state"] == "done"
    assert finished.verify() == []
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    next((out / "store" / "evaluate").glob("*/record.json")).write_text("{}")
    assert len(tm.open_run(out).verify()) > 0


@pytest.mark.ray
def test_run_writes_its_report(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    page = tm.open_run(out).report()
    assert page == out / "report" / "report.html" and page.is_file()


def test_run_draws_figures_of_its_report_as_charts(finished: tm.Run) -> None:
    run = finished
    for chart in (run.plot_plane(), run.plot_over_time()):
        spec = chart.to_dict()
        rows = [row for data in spec["datasets"].values() for row in data]
        assert {"best_in_time", "zero_shot"} <= {row["group"] for row in rows}
    with pytest.raises(UserError, match="split = 'val': the study is scored on test"):
        run.plot_plane("val")


def test_run_in_a_notebook_is_a_table_of_its_strategies(finished: tm.Run) -> None:
    shown = finished._repr_html_()
    assert "complete" in shown and shown.count("<tr>") == 3 and "best_in_time" in shown


def test_sync_of_a_run_says_what_is_left(finished: tm.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.tracker.sync", lambda out: (2, "it is down"))
    assert finished.sync() == {"tracker_pending": 2, "reason": "it is down"}


def test_messages_speak_of_arguments_and_leave_commands_alone(
    finished: tm.Run, world: World, tmp_path: Path
) -> None:
    files = Files(tmp_path)
    study = world.study()
    for match, call in {
        "^out .* is one of the inputs .* give another out$": lambda: tm.merge("average", files.paths, out=files.paths[0]),
        "give the base .base.$": lambda: tm.merge("ties", files.paths, out=files.out),
        "^overrides: recipe.lr": lambda: tm.load_study(study, ["recipe.lr=x"]),
        "^overrides nonsense: write key.path=value": lambda: tm.load_study(study, ["nonsense"]),
        "^split train: there is no such split": lambda: tm.evaluate(tmp_path, tm.load_study(study), split="train"),
        "^datasets: the study does not score x": lambda: tm.evaluate(tmp_path, tm.load_study(study), ["x"]),
        "^address 'nowhere': give": lambda: tm.run(tm.load_study(study), tmp_path / "out", "nowhere"),
        "^split val: the study is scored on test": lambda: finished.report("val"),
        "^val 2 must be a share": lambda: tm.import_data(tmp_path, tmp_path / "root", val=2),
        "^there is no option 'colour'; choose from name, role": lambda: tm.import_data(tmp_path, tmp_path / "root", colour=2),
        "`temporal-merge import-data SOURCE --out ": lambda: tm.init(tmp_path / "s.yaml", tmp_path / "none", "ViT-B-32"),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert not re.search(r"--[a-z]", re.sub(r"`[^`]*`", "", str(error.value)))


def test_notebook_view_shows_a_moment_and_escapes_what_others_wrote() -> None:
    running = (("t1 <b>", {"step": 5, "steps": 10, "samples": 40, "rate": 8.0, "loss": 0.5}, 9.0),)
    shown = as_html(Moment(3, 10, 60.0, 120.0, 0.4, running, (("best", 1, 2, 0.5),), notes=("a & b",)))
    for text in (
        "3 of 10 steps done",
        "60 s, about 2 min left",
        "value='0.4000'",
        "t1 &lt;b&gt;",
        "8 samples/s",
        "1/2",
        "0.500",
        "a &amp; b",
    ):
        assert text in shown
    assert bar_of_notebook() is None, "no notebook here"


def test_notebook_shows_one_output_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    handle = SimpleNamespace(update=lambda value: shown.append(f"again {value}"))
    display = SimpleNamespace(
        HTML=lambda text: text[:5], display=lambda value, display_id: (shown.append(value), handle)[1]
    )
    monkeypatch.setitem(
        sys.modules,
        "IPython",
        SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1), display=display),
    )
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    bar = bar_of_notebook()
    assert bar is not None
    bar(Moment(0, 1, 0.0))
    bar(Moment(1, 1, 0.0))
    assert shown == ["<div>", "again <div>"]
