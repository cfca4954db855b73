"""Exceptions that survive pickling on their way from a worker to the driver.

Pickle rebuilds an exception by calling its class with `args`. If `__init__` takes other arguments, unpickling fails in
the driver, and Ray reports a lost worker instead of the error.
Invariant: the exception that `portable` returns arrives with the message of the original.
"""

import copy

from ray import cloudpickle


def portable(error: Exception) -> Exception:
    """`error` itself if it survives pickling, else its message in the nearest base class that does."""
    if _survives(error):
        return error
    message = f"{type(error).__name__}: {error}"
    for kind in type(error).__mro__[1:]:
        try:
            stand_in = kind(message)
        except Exception:  # the constructor of this class takes other arguments, too
            continue
        if isinstance(stand_in, Exception) and _survives(stand_in) and str(stand_in) == message:
            return stand_in
    return RuntimeError(message)


def _survives(error: Exception) -> bool:
    """Whether pickling restores the error with its message. A deep copy uses the same protocol without the bytes."""
    try:
        cloudpickle.dumps(error)
        return str(copy.deepcopy(error)) == str(error)
    except Exception:  # constructors of other libraries may raise anything
        return False
