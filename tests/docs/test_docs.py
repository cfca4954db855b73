"""Every code block of the documentation is run, or checked against what it describes; every link has a target.

The language of a block decides its test: `python` is run, `yaml` is (a part of) a study and must be valid, `sh` are commands,
`json` is parsed, `text` is neither code nor command. A new kind of block fails until its test is decided.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from pydantic import BaseModel
from safetensors.numpy import save_file

from merge_service.techniques import forget_table
from pipeline.cli.app import app
from pipeline.recipes.carry_out import Output, merge_recipe
from pipeline.recipes.read import read_recipe
from pipeline.service.config import config_from
from pipeline.study.config import study_from
from pipeline.study.sections import BudgetSection, EvaluationSection, StrategySection
from pipeline.study.sections_resources import ResourcesSection
from tests.pipeline.recipes.tiny import write_models
from tests.pipeline.recipes.worded import write_worded
from tests.world import ROOT, World
from workers.training.recipe import Recipe

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
KINDS = ("python", "yaml", "sh", "json", "text")

OUTSIDE = {
    "docker": "builds an image from the network",
    "kubectl": "needs a Kubernetes cluster; the manifests are held to their schemas in tests/cluster/test_manifests.py",
    "cluster/launch/render": "the same; it is run there",
    "ray": "starts machines or processes of a cluster; tests/cluster/ starts its own",
    "sbatch": "needs Slurm; the script is checked in tests/cluster/test_manifests.py",
    "export": "sets variables for the commands after it",
    "python": "downloads or needs weights that are not in the repository",
    "pip": "installs from the network",
    "umask": "of the shell, for the commands after it",
    "base64": "the same",
    "mlflow": "serves until it is stopped; tests/pipeline/tracking/test_tracking_pyfunc.py serves the model of a study",
    "echo": "a request to that server; the same test sends it",
    "curl": "the same",
}
"""Commands that a test cannot run, and why: their syntax is checked."""

ELSEWHERE = {
    "run": "tests/pipeline/run/test_run.py",
    "submit": "tests/cluster/test_submit_jobs.py",
    "stop": "tests/cluster/test_submit_jobs.py",
    "ui": "tests/ui/test_mlflow_ui.py",
    "evaluate": "tests/pipeline/run/test_run.py",
    "check": "tests/pipeline/study/test_suites.py",
    "gc": "tests/pipeline/workspace/test_gc.py",
    "service": "tests/pipeline/cli/test_service.py",
    "serve": "tests/pipeline/service/test_together.py",
    "arrive": "tests/pipeline/cli/test_remote.py",
    "next": "tests/pipeline/cli/test_remote.py",
}
"""Commands of ours that the documentation calls with placeholders, or that take long: there they run, here they are parsed."""


IN_ORDER = ("own_data.md",)
"""Pages whose blocks build on one another from an empty folder: `test_own_pages.py` runs them."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*kinds: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1].strip(), match[2]))
    return [block for block in found if not kinds or block.kind in kinds]


def single_blocks(kind: str) -> list[Block]:
    """Blocks that run alone."""
    return [block for block in blocks(kind) if block.page.name not in IN_ORDER]


def test_every_block_says_what_it_is() -> None:
    assert [f"{block}: {block.kind!r}" for block in blocks() if block.kind not in KINDS] == []


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """The simple commands of a block, without comments, variables set for them, and redirections."""
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    if "'" in block.text and block.text.count('"') % 2 == 0 and re.search(r'"[^"]*\n', block.text):
        lines = [block.text]  # one command with a text over several lines
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        target = False  # of a redirection
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>"):
                target = bool(set(word) & set("<>"))
                if words and not target:
                    yield words
                    words = []
            elif target:
                target = False
            elif words or not re.match(r"\w+=", word):
                words.append(word.lstrip("("))


def ours(words: list[str]) -> list[str] | None:
    """The arguments of a `temporal-merge` command."""
    return words[1:] if words[0].removeprefix(".venv/bin/") == "temporal-merge" else None


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_shell_block_is_sound_and_every_command_of_it_exists(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    group: Any = typer.main.get_command(app)
    for words in commands(block):
        arguments = ours(words)
        if arguments is not None:
            group.commands[arguments[0]].make_context(
                arguments[0], arguments[1:]
            )  # raises on what it does not know
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        else:
            name = re.sub(r"^(?:.+/bin/)?(python|pip)[\d.]*$", r"\1", words[0])
            assert name in OUTSIDE or (ROOT / words[0]).exists(), f"{block}: {words[0]}"


@pytest.mark.parametrize("block", blocks("text"), ids=str)
def test_command_in_a_usage_text_exists_with_its_options(block: Block) -> None:
    group: Any = typer.main.get_command(app)
    for line in re.split(r"\n(?! )", block.text):
        found = re.findall(r"temporal-merge ([\w-]+)(?: ([a-z]+))?", line)
        for name, _ in found:
            assert name in group.commands, f"{block}: {name}"
        commands = [
            getattr(group.commands[one], "commands", {}).get(more, group.commands[one]) for one, more in found
        ]
        known = {option for one in commands for p in one.params for option in (*p.opts, *p.secondary_opts)}
        assert not found or set(re.findall(r"(?<![\w-])(--[\w-]+)", line)) <= known, f"{block}: {line}"


def test_commands_that_are_parsed_here_run_elsewhere() -> None:
    for name, file in ELSEWHERE.items():
        text = (ROOT / file).read_text()
        assert re.search(rf'"{name}"|\b{name}_command|import .*collect', text), f"{file} does not run {name}"


# --- a place where the documentation is true --------------------------------------------------------------------------


def linked(source: str, target: str) -> None:
    """Copy a file of a run; weights, which nothing changes in place, as a link: a run holds hundreds of megabytes of them."""
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@pytest.fixture
def desk(world: World, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as the pages assume it: the demo's study and its run (here a tiny one), and checkpoints."""
    (tmp_path / "configs").mkdir()
    shutil.copyfile(world.study(), tmp_path / "configs" / "demo.yaml")
    (tmp_path / "configs" / "fomo_in_flux").symlink_to(ROOT / "configs" / "fomo_in_flux")
    shutil.copytree(undisturbed, tmp_path / "runs" / "demo", copy_function=linked)
    rng = np.random.default_rng(0)
    for name in ("base", "e1", "e2", "e3", "new", "a", "b", "c"):
        tensors = {"visual.w": rng.normal(size=(4, 4)).astype(np.float32), "v": rng.normal(size=8).astype(np.float32)}  # fmt: skip
        save_file(tensors, tmp_path / f"{name}.safetensors")
    write_models(tmp_path / "models")
    for name, key in (("recipe.yaml", "technique"), ("mergekit_config.yml", "merge_method")):
        (tmp_path / name).write_text(
            next(one.text for one in blocks("yaml") if is_recipe(one) and one.text.startswith(key))
        )
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "model.ckpt")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove techniques that a block declares."""
    monkeypatch.setattr("merge_service.techniques.registry._declared", {})
    forget_table()
    yield
    monkeypatch.undo()
    forget_table()


def write_modules(block: Block, desk: Path) -> list[str]:
    """Write the modules of the block's page: blocks that begin with a file name."""
    found = {}
    for other in blocks("python"):
        named = re.match(r"# (\w+)\.py\n", other.text)
        if named and other.page == block.page:
            (desk / f"{named[1]}.py").write_text(other.text)
            found[named[1]] = other
    return list(found)


@pytest.mark.parametrize("block", single_blocks("sh"), ids=str)
def test_commands_that_need_nothing_else_run(
    block: Block, desk: Path, cli: Callable[..., Any], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in write_modules(block, desk):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for words in commands(block):
        arguments = ours(words)
        if arguments is None or arguments[0] in ELSEWHERE or "--address" in arguments:
            continue
        answer = cli(*arguments)
        assert answer.code == 0, f"{block}: {shlex.join(arguments)}: {answer.err}"


@pytest.mark.parametrize("block", single_blocks("python"), ids=str)
def test_python_block_runs(block: Block, desk: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that begins with the name of a file is that file, to be imported by the others of its page."""
    monkeypatch.syspath_prepend(str(desk))
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)  # a block may set it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    for name in write_modules(block, desk):
        monkeypatch.delitem(sys.modules, name, raising=False)
        if block.text.startswith(f"# {name}.py\n"):
            __import__(name)
            return
    merged = next((desk / "runs" / "demo" / "store" / "merge").iterdir()).name
    text = block.text.replace("<name>", merged).replace("models:/demo@", "models:/tiny@")
    exec(compile(text, str(block), "exec"), {})


# --- studies ----------------------------------------------------------------------------------------------------------

STUDY = {
    "name": "documented",
    "model": {"config": "tiny-clip"},
    "data": {"root": "data", "held_out": ["held"]},
    "recipe": {"lr": 1e-3},
    "budget": {"steps_per_task": 10},
    "grid": {"strategies": ["best_in_time"]},
}
"""What a fragment is completed with."""


def fragments(block: Block) -> list[dict[str, Any]]:
    """The block as a whole, or line by line if each line is one way to write the same key."""
    lines = block.text.splitlines()
    keys = [line.partition(":")[0] for line in lines if line and not line.startswith((" ", "#"))]
    alternatives = len(keys) > len(set(keys))
    return [yaml.safe_load(line) for line in lines if line] if alternatives else [yaml.safe_load(block.text)]


def is_recipe(block: Block) -> bool:
    return block.page.name == "recipes.md"


@pytest.mark.parametrize("block", [one for one in blocks("yaml") if is_recipe(one)], ids=str)
def test_yaml_block_of_a_recipe_is_carried_out(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path / "models")
    write_worded(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(block.text)
    assert (
        merge_recipe(read_recipe(tmp_path / "recipe.yaml").recipe, Output(tmp_path / "out")).out
        == tmp_path / "out"
    )


def is_service(block: Block) -> bool:
    return block.page.name == "service.md"


@pytest.mark.parametrize("block", [one for one in blocks("yaml") if is_service(one)], ids=str)
def test_yaml_block_is_part_of_a_valid_service(block: Block) -> None:
    whole = yaml.safe_load((ROOT / "configs" / "service.yaml").read_text())
    config_from({**whole, **yaml.safe_load(block.text)}, str(block))


@pytest.mark.parametrize(
    "block", [one for one in blocks("yaml") if not (is_recipe(one) or is_service(one))], ids=str
)
def test_yaml_block_is_part_of_a_valid_study(block: Block) -> None:
    for fragment in fragments(block):
        tree = {**STUDY, **fragment}
        if "strategies" not in tree["grid"]:
            tree["grid"] = {**tree["grid"], **STUDY["grid"]}
        if "stream" in tree["grid"]:
            tree.pop("stream", None)
        elif "stream" not in tree:
            tree["stream"] = {"tasks": ["one", "two"]}
        if "suite" not in tree["data"] and "adaptation" not in tree["data"]:
            streams = tree["grid"].get("stream", [tree.get("stream", {})])
            tasks = sorted({task for stream in streams for task in stream.get("tasks", ())})
            tree["data"] = {**tree["data"], "adaptation": tasks or ["one"]}
        study_from(tree, str(block))


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_block_is_json(block: Block) -> None:
    json.loads(block.text)


def section_of_studies(heading: str) -> str:
    return (ROOT / "docs" / "studies.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def leaves(tree: dict[str, Any], *inner: str) -> dict[str, Any]:
    """The tree with the keys of its branches `inner` written as branch.key."""
    branches = {f"{name}.{key}": value for name in inner for key, value in tree[name].items()}
    return {key: value for key, value in tree.items() if key not in inner} | branches


def defaults(section: BaseModel) -> dict[str, Any]:
    """Of every key, also of those that a section leaves out of study.yaml while they are not used."""
    every = {name: getattr(section, name) for name in type(section).model_fields}
    plain = {
        name: defaults(value) if isinstance(value, BaseModel) else value for name, value in every.items()
    }
    return json.loads(json.dumps(plain))


DEFAULTS = {
    "Recipe": leaves(defaults(Recipe()), "augment"),
    "Evaluation": defaults(EvaluationSection()),
    "Resources": leaves(defaults(ResourcesSection()), "experts", "evaluation", "merging"),
}


@pytest.mark.parametrize("heading", DEFAULTS)
def test_page_of_studies_states_every_key_with_its_default(heading: str) -> None:
    cells = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", section_of_studies(heading), re.MULTILINE)
    stated = {key: yaml.safe_load(value) for key, value in cells}
    assert stated.keys() == DEFAULTS[heading].keys()
    for key, value in DEFAULTS[heading].items():
        assert stated[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, list) else value), key


def test_page_of_studies_names_every_key_of_a_strategy_and_of_a_budget() -> None:
    for heading, section in (("Strategies", StrategySection), ("Budget", BudgetSection)):
        named = re.findall(r"`(\w+)`", section_of_studies(heading))
        assert section.model_fields.keys() - set(named) == set(), heading


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE)  # fmt: skip
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name} -> {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} -> {target}"


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = ["-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    answer = subprocess.run([sys.executable, *build], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://[^"]+', (tmp_path / "site" / "index.html").read_text())  # fmt: skip
    assert loaded == []


def test_make_says_what_pip_is_about_to_do_before_it_is_silent_for_minutes() -> None:
    asked = ["make", "--dry-run", "--what-if=setup.cfg", "demo"]
    lines = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    install = next(place for place, line in enumerate(lines) if "pip install" in line)
    said = next(line for line in lines[:install] if line.startswith("echo"))
    assert "torch" in said and "GB" in said and "minutes" in said
    assert any("configs/demo.yaml" in line for line in lines[install:])
