"""The `temporal-merge` command: what commands there are, and how a command ends.

Invariant: importing this module stays cheap (no torch, ray or mlflow), and a person's mistake ends with exit code 2 and
one clear message; 0 is done, 1 is a failure that is not the user's, 130 and 143 are signals.
"""

import os
import signal
import sys
from typing import NoReturn

import typer

from pipeline import cli_files, cli_studies, cli_upkeep

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

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    spell_out()
    sys.exit(_main())


def _main() -> int:
    from merge_service.errors import UserError
    from pipeline.console import complain

    try:
        return app(standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        if hasattr(error, "show"):  # wrong usage, as the command line library tells it
            error.show()
            return 2
        if isinstance(error, UserError) or getattr(error, "exit_code", None) == 2:
            complain("error", str(error))
            return 2
        if os.environ.get("TEMPORAL_MERGE_TRACEBACK"):
            raise
        complain("failed", f"{type(error).__name__}: {error}")
        print("(set TEMPORAL_MERGE_TRACEBACK=1 for the traceback)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
