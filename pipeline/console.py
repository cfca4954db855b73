"""Consoles of the command line, with their colours and encoding.

Invariant: colours appear on terminals only (NO_COLOR is respected), piped output is never folded, and no character
makes a command fail: one that the encoding lacks is written as its name or its nearest letter.
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
    "γ": "gamma", "→": "->", "∘": "o", "∝": "~", "…": "...", "\u0302": "^", "\u0304": "_", "–": "-", "—": "-", "×": "x", "≤": "<=", "≥": ">=",
}  # fmt: skip


def spell_out() -> None:
    """Make stdout and stderr replace characters that their encoding lacks, instead of failing."""
    codecs.register_error("spelled-out", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # tests and notebooks put other streams there
            stream.reconfigure(errors="spelled-out")


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of a file name that is not text: unchanged
        return os.fsencode(sign), error.start + 1
    near = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return _WORDS.get(sign) or near or "?", error.start + 1


def console(*, stderr: bool = False) -> Console:
    """A console on stdout, or on stderr."""
    made = Console(stderr=stderr)
    # Piped output is for files and other programs: never fold a table there.
    return made if made.is_terminal else Console(stderr=stderr, width=200)


def complain(word: str, text: str, style: str = ERROR) -> None:
    """Print one message on stderr, `word: text`, with the word in colour; lines are not wrapped."""
    console(stderr=True).print(
        Text.assemble((f"{word}:", style), f" {text}"), soft_wrap=True, highlight=False
    )
