"""Techniques in a file that the user names (`--module my.py`): no package, nothing to install.

Invariant: a file is run only if a person named it on the command line, or if a driver that uses it sends its path to a worker. No
study, checkpoint or record can name one.
"""

import importlib.util
import sys
from pathlib import Path

from merge_service.errors import TechniqueError
from merge_service.techniques import registry


def use_file(file: Path) -> tuple[str, ...]:
    """Register the techniques that a module file declares; returns their names. Raises TechniqueError for a missing file, a name
    that another module has, and a file that cannot be run or declares nothing.
    """
    file = file.absolute()
    if not file.is_file() or file.suffix != ".py" or not file.stem.isidentifier():
        raise TechniqueError(
            f"{file} is no module; give a Python file that declares a technique, such as my.py"
        )
    held = sys.modules.get(file.stem)
    spec = getattr(held, "__spec__", None) if held else importlib.util.find_spec(file.stem)
    other = getattr(spec, "origin", None) if spec else None
    if (held or spec) and (other is None or Path(other).absolute() != file):
        raise TechniqueError(
            f"{file}: there is another module {file.stem} ({other or 'built in'}); rename the file"
        )
    import_file(file)
    found = tuple(
        name for name, one in registry.others().items() if one.origin and one.origin.file == str(file)
    )
    if not found:
        raise TechniqueError(
            f"{file} declares no technique; decorate a function or a class with @technique(...)"
        )
    return found


def import_file(file: Path) -> None:
    """Run a module file under its own name, once. Raises TechniqueError naming the line that fails."""
    if file.stem in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except TechniqueError:
        del sys.modules[file.stem]
        raise
    except Exception as error:  # a user's module may raise anything
        del sys.modules[file.stem]
        raise TechniqueError(
            f"{file}{_line(error, file)} cannot be run ({type(error).__name__}: {error})"
        ) from error


def _line(error: Exception, file: Path) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    trace, line = error.__traceback__, ""
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file:
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return line
