"""The reference of commands in cli.md, made from the command line itself when the site is built, so that it cannot be out of date."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page; puts the commands in the place of their mark."""
    mark = "<!-- commands -->"
    return markdown.replace(mark, reference()) if mark in markdown else markdown


def reference() -> str:
    """One section per command: help, usage, and a table of options."""
    import typer.main

    from pipeline.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n".join(_section(name, command) for name, command in sorted(group.commands.items()))


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
