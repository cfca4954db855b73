"""The console script: the one module of a name that nobody else gives a file of theirs.

Invariant: the command runs this project's packages, whatever `pipeline.py` or `workers.py` lies on PYTHONPATH.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of `temporal-merge`."""
    root = Path(__file__).parent
    spec = spec_from_file_location("_code_of_temporal_merge", root / "cluster" / "code.py")
    assert spec is not None and spec.loader is not None
    code = module_from_spec(spec)
    spec.loader.exec_module(code)
    code.own_code_first(str(root))()

    from pipeline.cli import app as cli

    cli.main()
