"""The `temporal-merge` command: which commands there are, their options, and what they show; each calls one function of another folder.

Used from outside: `app` (`main`, the entry point). `python -m pipeline.cli` is the same command.
"""

from merge_service.moved import names_from

__getattr__ = names_from("pipeline.cli.app")
