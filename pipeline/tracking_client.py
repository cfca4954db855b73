"""An MLflow client that asks again at once where asking twice changes nothing.

A row takes several requests, and one that fails is begun anew; at a server that fails every second request a row of ten would
never pass. Invariant: a request that makes something new is sent once, for its answer may be lost although it was carried
out (the sink looks for the thing before it makes it again), and one that hung is not asked again: whoever waits has waited.
"""

import time
from collections.abc import Callable
from typing import Any

TRIES, QUICK_SECONDS, PAUSE_SECONDS = 4, 1.0, 0.05
ONCE = frozenset(
    {
        "create_run", "create_experiment", "create_logged_model", "create_registered_model", "create_model_version",
        "log_outputs", "delete_tag",
    }
)  # fmt: skip
"""What leaves a second thing, or an error, when it is done twice."""
PASSING = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "IO_ERROR"})
"""Error codes that may be another the next time."""


class PatientClient:
    """`client`, each of whose methods but `ONCE` is called up to `TRIES` times while it fails fast for a passing reason."""

    def __init__(self, client: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._clock = client, clock

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name in ONCE or not callable(method):
            return method

        def patient(*arguments: Any, **options: Any) -> Any:
            for left in reversed(range(TRIES)):
                began = self._clock()
                try:
                    return method(*arguments, **options)
                except Exception as error:
                    if not left or not is_passing(error) or self._clock() - began > QUICK_SECONDS:
                        raise
                time.sleep(PAUSE_SECONDS)

        return patient


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later: the server failed or was not reached, and did not say no."""
    code = getattr(error, "error_code", None)
    return isinstance(error, OSError) if code is None else code in PASSING
