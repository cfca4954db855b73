"""Errors on their way from a worker to the driver, which pickle takes and not every exception survives.

Pickle makes an exception again by calling its class with `args`. A class whose `__init__` wants something else fails there, in
the driver, and Ray then reports a lost worker in place of the error. Invariant: what `portable` returns arrives with the
message of the error that it was given.
"""

import copy

from ray import cloudpickle


def portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else its message in the nearest of its base classes that does."""
    if _survives(error):
        return error
    message = f"{type(error).__name__}: {error}"
    for kind in type(error).__mro__[1:]:
        try:
            stand_in = kind(message)
        except Exception:  # this class, too, is made in another way
            continue
        if isinstance(stand_in, Exception) and _survives(stand_in) and str(stand_in) == message:
            return stand_in
    return RuntimeError(message)


def _survives(error: Exception) -> bool:
    """Whether pickle makes an equal error of it. A deep copy takes the same way as pickle, without bytes in between."""
    try:
        cloudpickle.dumps(error)
        return str(copy.deepcopy(error)) == str(error)
    except Exception:  # whatever a foreign class raises when it is made in the wrong way
        return False
