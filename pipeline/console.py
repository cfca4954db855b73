"""Where the command line writes, and in which colours.

Invariant: colours are for terminals only (NO_COLOR is respected), and what is piped is never folded.
"""

from rich.console import Console
from rich.text import Text

ERROR, WARNING, GOOD, BUSY = "bold red", "yellow", "bold green", "bold cyan"


def console(*, stderr: bool = False) -> Console:
    """A console on stdout, or on stderr."""
    made = Console(stderr=stderr)
    # Piped output is for files and other programs: never fold a table there.
    return made if made.is_terminal else Console(stderr=stderr, width=200)


def complain(word: str, text: str, style: str = ERROR) -> None:
    """One message on stderr, `word: text`, the word in colour; lines are as long as they are."""
    console(stderr=True).print(
        Text.assemble((f"{word}:", style), f" {text}"), soft_wrap=True, highlight=False
    )
