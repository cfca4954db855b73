"""The `temporal-merge` command: its subcommands, and its exit codes.

Invariant: importing this module stays cheap (no torch, ray or mlflow). A user's mistake ends with exit code 2 and one clear
message. 0 is success, 1 is a failure that is not the user's, 130, 141 (the reader of the output is gone) and 143 are signals.
"""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from cluster.code import own_code_first
from pipeline import signals
from pipeline.cli import adapters as cli_adapters
from pipeline.cli import files as cli_files
from pipeline.cli import merging as cli_merging
from pipeline.cli import own as cli_own
from pipeline.cli import remote as cli_remote
from pipeline.cli import service as cli_service
from pipeline.cli import studies as cli_studies
from pipeline.cli import trajectories as cli_trajectories
from pipeline.cli import upkeep as cli_upkeep

PANELS = {
    "Get started": (cli_own.import_data, cli_own.init),
    "Plan and run": (cli_studies.plan, cli_studies.run, cli_studies.submit, cli_studies.stop),
    "Look": (cli_studies.status, cli_studies.report, cli_upkeep.ui),
    "Files": (
        cli_merging.merge,
        cli_merging.recipe,
        cli_merging.convert,
        cli_adapters.extract,
        cli_trajectories.trajectory,
        cli_files.publish,
        cli_files.evaluate,
        cli_files.measure,
        cli_merging.learn,
        cli_files.techniques,
        cli_files.check,
    ),
    "Serve": (cli_remote.serve, cli_remote.arrive, cli_remote.next),
    "Upkeep": (cli_upkeep.export, cli_upkeep.verify, cli_upkeep.sync, cli_upkeep.gc, cli_upkeep.pack),
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
LIBRARIES = ("torch", "ray", "open_clip_torch", "mlflow")
"""Libraries whose versions `--version` shows too, for reports of faults."""


class PlainHelp(TyperCommand):
    """A command whose help is plain text, with each option above or beside its explanation; columns in a frame would cut names."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Called by the command line library for --help."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)


for panel, commands in PANELS.items():
    for one in commands:
        app.command(cls=PlainHelp, rich_help_panel=panel, context_settings={"max_content_width": 110})(one)
for act in cli_service.COMMANDS:
    cli_service.app.command(cls=PlainHelp, context_settings={"max_content_width": 110})(act)
app.add_typer(cli_service.app, rich_help_panel="Serve")


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        others = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        print(f"temporal-merge {version('temporal-merge')} (Python {platform.python_version()}, {others})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_say_version,
            is_eager=True,
            help="Say which version this is, and of which libraries.",
        ),
    ] = False,
) -> None: ...


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
        code = 1 if signals.received() else _tell(error)  # errors while ending on a signal are not reported
    return signals.report(code)


def _tell(error: Exception) -> int:
    """Print what went wrong; returns the exit code."""
    from merge_service.errors import UserError
    from pipeline.console import complain
    from pipeline.files.disk import explain
    from pipeline.run.output import ReaderGone

    if isinstance(error, ReaderGone):
        return 141
    if hasattr(error, "show"):  # wrong usage, reported by the command line library
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
    """Arguments with `~` and variables replaced that the shell has left; the study replaces those in values of --set. Raises
    UserError, also for an empty argument: as a path it would be the current directory.
    """
    from merge_service.errors import UserError
    from pipeline.files.paths import expanded

    answer: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if option == "--set" or (answer and answer[-1] == "--set"):
            answer.append(argument)
            continue
        if not argument or (equals and not value):
            given = option or (answer[-1] if answer and answer[-1].startswith("-") else "an argument")
            raise UserError(
                f"{given} is empty, as a variable that is not set leaves it; give a value, or leave it out"
            )
        try:
            answer.append(f"{option}{equals}{expanded(value)}")
        except ValueError as error:
            raise UserError(f"{option or 'argument'}: {error}") from None
    return answer
