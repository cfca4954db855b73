"""The `temporal-merge` command: what commands there are, and how a command ends.

Invariant: importing this module stays cheap (no torch, ray or mlflow), and a person's mistake ends with exit code 2 and
one clear message; 0 is done, 1 is a failure that is not the user's, 130, 141 (nobody reads the answer) and 143 are signals.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import typer

from cluster.code import own_code_first
from pipeline.cli import files as cli_files
from pipeline.cli import signals
from pipeline.cli import studies as cli_studies
from pipeline.cli import upkeep as cli_upkeep

PANELS = {
    "Plan and run": (cli_studies.plan, cli_studies.run, cli_studies.submit, cli_studies.stop),
    "Look": (cli_studies.status, cli_studies.report, cli_upkeep.ui),
    "Files": (cli_files.merge, cli_files.evaluate, cli_files.techniques, cli_files.check),
    "Upkeep": (cli_upkeep.verify, cli_upkeep.sync, cli_upkeep.gc),
}

app = typer.Typer(
    name="temporal-merge",
    help="""Train experts as tasks arrive, merge them over time, and know which strategy to deploy.

    Begin with three commands: `temporal-merge plan configs/demo.yaml` says what a study would do, `temporal-merge run
    configs/demo.yaml` does it (again after any crash: it goes on), `temporal-merge report runs/demo` says what to deploy.""",
    epilog="`temporal-merge COMMAND --help` has an example of each; `--json` is the same answer for programs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for panel, commands in PANELS.items():
    for one in commands:
        app.command(rich_help_panel=panel)(one)


def main() -> NoReturn:
    """Entry point of the console script."""
    from pipeline.console import spell_out
    from pipeline.run.output import steady

    signals.watch()
    own_code_first(str(Path(__file__).parents[2]))()
    spell_out()
    with steady(exacting=True):
        sys.exit(_main())


def _main() -> int:
    try:
        code = app(args=_written_out(sys.argv[1:]), standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        code = 128 + signals.SIGINT
    except Exception as error:
        code = 1 if signals.received() else _tell(error)  # whatever breaks on the way out is no news
    return signals.tell(code)


def _tell(error: Exception) -> int:
    """Say what went wrong: the exit code."""
    from merge_service.errors import UserError
    from pipeline.console import complain
    from pipeline.files.disk import explain
    from pipeline.run.output import ReaderGone

    if isinstance(error, ReaderGone):
        return 141
    if hasattr(error, "show"):  # wrong usage, as the command line library tells it
        error.show()
        return 2
    known = isinstance(error, UserError) or getattr(error, "exit_code", None) == 2
    text = str(error) if known else explain(error)
    if text is not None:
        complain("error", text)
        return 2
    if os.environ.get("TEMPORAL_MERGE_TRACEBACK"):
        raise error
    complain("failed", f"{type(error).__name__}: {error}")
    print("(set TEMPORAL_MERGE_TRACEBACK=1 for the traceback)", file=sys.stderr)
    return 1


def _written_out(arguments: Sequence[str]) -> list[str]:
    """Arguments with `~` and variables replaced that the shell has left; a value of --set is a study's matter. Raises UserError."""
    from merge_service.errors import UserError
    from pipeline.study.places import expanded

    answer: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if option == "--set" or (answer and answer[-1] == "--set"):
            answer.append(argument)
            continue
        try:
            answer.append(f"{option}{equals}{expanded(value)}")
        except ValueError as error:
            raise UserError(f"{option or 'argument'}: {error}") from None
    return answer
