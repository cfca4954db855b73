"""Reader of a dataset's text files: class names, prompts, kind, number of shards.

A class is identified by its line number. So lines are split as editors split them: at LF, CR LF or a lone CR, and not at U+2028,
U+0085 or a form feed, at which `str.splitlines` splits as well.
Invariant: line i of the file is entry i of the result; only blank lines at the end are dropped.
"""

from pathlib import Path

from merge_service.errors import UserError


def read_lines(path: Path) -> tuple[str, ...]:
    """The stripped lines of a UTF-8 file, with or without byte order mark; () if there is no such file.

    A blank line in the middle is the entry "". Raises UserError naming the line that is not UTF-8 or holds a NUL (UTF-16 text).
    """
    if not path.is_file():
        return ()
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 1].hex()
        number = len(_cut(data[: error.start].decode("utf-8", "replace")))
        raise UserError(
            f"{path}, line {number}: byte 0x{bad} is not UTF-8 text; save the file as UTF-8"
        ) from None
    lines = [line.strip(" \t") for line in _cut(text)]
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise UserError(
                f"{path}, line {number} holds a NUL character; save the file as UTF-8, not UTF-16"
            )
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


def class_names(path: Path) -> tuple[str, ...]:
    """The class names, one per line; sample labels are line numbers from 0. Raises UserError for a blank line, and as `read_lines`."""
    names = read_lines(path)
    if "" in names:
        number = names.index("") + 1
        raise UserError(
            f"{path}, line {number} is blank: labels are line numbers, so a blank line is a class without a name. Name the class "
            f"(label {number - 1}), or remove the line if the labels do not count it"
        )
    return names


def filled_lines(path: Path) -> tuple[str, ...]:
    """The lines that are not blank, for files whose line numbers have no meaning (prompts, kind). Raises UserError as `read_lines` does."""
    return tuple(line for line in read_lines(path) if line)


def stated_number(path: Path) -> int | None:
    """The number in the first line of a file (nshards.txt); None if the file is missing or blank. Raises UserError for other text."""
    lines = filled_lines(path)
    if not lines:
        return None
    if not (lines[0].isascii() and lines[0].isdigit() and len(lines[0]) <= 9):
        raise UserError(f"{path} states {lines[0][:20]!r}; it must hold the number of shards")
    return int(lines[0])


def _cut(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
