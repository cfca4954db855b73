"""Where the command line writes, and in which colours.

Invariant: colours are for terminals only (NO_COLOR is respected), what is piped is never folded, and no character ends a
command: where the encoding lacks it, its name or nearest letter is written.
"""

import codecs
import os
import sys
import unicodedata

from rich.console import Console
from rich.text import Text

ERROR, WARNING, GOOD, BUSY = "bold red", "yellow", "bold green", "bold cyan"


_WORDS = {
    "θ": "theta", "τ": "tau", "λ": "lambda", "Δ": "Delta", "Σ": "sum", "Ω": "Omega", "·": "*", "±": "+-", "²": "^2", "ᵀ": "^T",
    "→": "->", "∘": "o", "∝": "~", "…": "...", "\u0302": "^", "\u0304": "_", "–": "-", "—": "-", "×": "x", "≤": "<=", "≥": ">=",
}  # fmt: skip


def spell_out() -> None:
    """Make stdout and stderr write what their encoding lacks in other characters, instead of failing."""
    codecs.register_error("spelled-out", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # tests and notebooks put other streams there
            stream.reconfigure(errors="spelled-out")


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of a file's name that is no text: as it is
        return os.fsencode(sign), error.start + 1
    near = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return _WORDS.get(sign) or near or "?", error.start + 1


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
