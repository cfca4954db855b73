"""What pages get from the code when the site is built, so that it cannot be out of date: the reference of commands in cli.md, and the
families of techniques in merging.md."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page; puts what is made here in the place of its mark."""
    for mark, made in (("<!-- commands -->", reference), ("<!-- techniques -->", families)):
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def families() -> str:
    """A table of the techniques by family, each family in the words of its module."""
    from merge_service.techniques.families import FAMILIES

    rows = []
    for family in FAMILIES:
        what = str(family.__doc__).partition("\n")[0].rstrip(".")
        names = (
            "".join([f"`{one.name}`", *(f" (`{alias}`)" for alias in one.aliases)])
            for one in family.TECHNIQUES
        )
        rows.append(f"| {what} | {', '.join(names)} |")
    return "\n".join(["| family | techniques |", "|---|---|", *rows])


def reference() -> str:
    """One section per command: help, usage, and a table of options."""
    import typer.main

    from pipeline.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n".join(_section(name, command) for name, command in sorted(_every(group).items()))


def _every(group: Any) -> dict[str, Any]:
    """Every command by its name; one of a group as "GROUP NAME"."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        below = _every(command) if hasattr(command, "commands") else None
        found |= {name: command} if below is None else {f"{name} {one}": each for one, each in below.items()}
    return found


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["temporal-merge", name, *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
    rows = [f"| `{'`, `'.join([*p.opts, *p.secondary_opts])}` | {_cell(p)} |" for p in options]
    table = ["", "| option | |", "|---|---|", *rows] if rows else []
    return "\n".join([f"## {name}", "", f"`{usage}`", "", command.help or "", *table, ""])


def _cell(option: Any) -> str:
    text = (option.help or "").replace("|", "\\|")
    return f"{text} (required)" if option.required else text
