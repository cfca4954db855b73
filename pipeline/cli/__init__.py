"""The `temporal-merge` command: its subcommands, their options, and their output; each calls one function of another folder.

Used from outside: `app` (`main`, the entry point). `python -m pipeline.cli` is the same command.
"""

from merge_service.moved import names_from

__getattr__ = names_from("pipeline.cli.app")
