"""An MLflow client that asks again at once where asking twice changes nothing, and gives a slow server more time.

A row takes several requests, and one that fails is begun anew; at a server that fails every second request a row of ten would
never pass. Invariant: a request that makes something new is sent once, for its answer may be lost although it was carried
out (the sink looks for the thing before it makes it again), and one that hung is not asked again: whoever waits has waited.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import TrackingError

TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
TIMEOUTS = (10, 30, 120)
"""Seconds that one request may take: the first until one was cut off, then the next. The last is MLflow's own default."""
TRIES, QUICK_SECONDS, PAUSE_SECONDS = 4, 1.0, 0.05
PAGE, PAGES = 500, 2000
ONCE = frozenset(
    {
        "create_run", "create_experiment", "create_logged_model", "create_registered_model", "create_model_version",
        "log_outputs", "delete_tag",
    }
)  # fmt: skip
"""What leaves a second thing, or an error, when it is done twice."""
PASSING = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "IO_ERROR"})
"""Error codes that may be another the next time."""
_CUT_OFF = re.compile(r"time(d )?-?out", re.IGNORECASE)
"""What the client says of a request that it has cut off; a locked database that is waited for as long does not say so."""


class TooSlow(TrackingError):
    """A request was cut off before its answer came; the next may take longer."""


class Limit:
    """How long a request may take, and when (on the clock of `time.monotonic`) one was last answered or given more time.

    Who sets MLFLOW_HTTP_REQUEST_TIMEOUT decides it for good; else it grows after each request that was cut off.
    """

    def __init__(self) -> None:
        own = os.environ.get(TIMEOUT_VARIABLE, "")
        self._left = [int(own)] if own.isdigit() and int(own) else list(TIMEOUTS)
        self.moved = 0.0

    @property
    def seconds(self) -> int:
        return self._left[0]

    @property
    def longest(self) -> int:
        """What it may grow to, in this process and, as far as is known, in another."""
        return self._left[-1]

    def apply(self) -> None:
        """Have MLflow's client keep it. The environment is left alone: other threads and programs read it."""
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

        MLFLOW_HTTP_REQUEST_TIMEOUT.default = self.seconds

    def grow(self, now: float) -> str:
        """A request was cut off: what to say of it."""
        was, self._left = self.seconds, self._left[1:] or self._left
        self.apply()
        text = f"the tracker took more than {was} s to answer"
        if self.seconds > was:
            self.moved = now
            return f"{text}; from now on it may take {self.seconds} s"
        return f"{text}; set {TIMEOUT_VARIABLE} to more seconds than that"


class PatientClient:
    """`client`, each of whose methods but `ONCE` is called up to `TRIES` times while it fails fast for a passing reason.

    Raises TooSlow for a request that `limit` has cut off.
    """

    def __init__(
        self, client: Any, limit: Limit | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client, self._clock = client, clock
        self._limit = limit or Limit()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method

        def patient(*arguments: Any, **options: Any) -> Any:
            for left in reversed(range(1 if name in ONCE else TRIES)):
                began = self._clock()
                try:
                    answer = method(*arguments, **options)
                    self._limit.moved = self._clock()
                    return answer
                except Exception as error:
                    took = self._clock() - began
                    if not is_passing(error):
                        self._limit.moved = self._clock()  # it said no, so it is there
                    elif took >= self._limit.seconds and _CUT_OFF.search(str(error)):
                        raise TooSlow(f"{name}: {self._limit.grow(self._clock())}") from error
                    if not left or not is_passing(error) or took > QUICK_SECONDS:
                        raise
                time.sleep(PAUSE_SECONDS)

        return patient


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later: the server failed or was not reached, and did not say no."""
    code = getattr(error, "error_code", None)
    return isinstance(error, OSError) if code is None else code in PASSING


def pages(search: Callable[..., Any], experiment_ids: list[str], query: str | None) -> Iterator[Any]:
    """Every result of one of MLflow's paged searches. Raises TrackingError when the pages never end."""
    token = None
    for _ in range(PAGES):
        found = search(experiment_ids, filter_string=query or "", max_results=PAGE, page_token=token)
        yield from found
        token = found.token
        if not token:
            return
    raise TrackingError("the tracking server's list of results does not end")
