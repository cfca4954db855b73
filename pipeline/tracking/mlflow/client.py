"""An MLflow client that retries idempotent requests at once, and extends the timeout of a slow server.

A row takes several requests and is delivered again from the start if one fails; at a server that fails every second request, a
row of ten requests would never be delivered.

Invariant: a request that creates something is sent once, because it may have been carried out although its answer was lost (the
sink looks for the result before it creates it again). A request that timed out is not repeated at once.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import TrackingError

TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
TIMEOUTS = (10, 30, 120)
"""Seconds that one request may take: the first until a request timed out, then the next. The last is MLflow's own default."""
TRIES, QUICK_SECONDS, PAUSE_SECONDS = 4, 1.0, 0.05
PAGE, PAGES = 500, 2000
ONCE = frozenset(
    {
        "create_run", "create_experiment", "create_logged_model", "create_registered_model", "create_model_version",
        "log_outputs", "delete_tag",
    }
)  # fmt: skip
"""Calls that create a second object, or fail, when they are repeated."""
PASSING = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "IO_ERROR"})
"""Error codes after which the same request may succeed."""
_CUT_OFF = re.compile(r"time(d )?-?out", re.IGNORECASE)
"""What the client's error says when it has cut off a request; the error of a locked database does not say so."""


class TooSlow(TrackingError):
    """A request timed out; the next one may take longer."""


class Limit:
    """The timeout of a request, and the time (`time.monotonic`) of the last answer or extension.

    MLFLOW_HTTP_REQUEST_TIMEOUT fixes the timeout; otherwise it grows after each request that timed out.
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
        """The longest timeout that may be in use, in this process and, as far as is known, in another."""
        return self._left[-1]

    def apply(self) -> None:
        """Set the timeout of MLflow's client. The environment is not changed, because other threads and programs read it."""
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

        MLFLOW_HTTP_REQUEST_TIMEOUT.default = self.seconds

    def grow(self, now: float) -> str:
        """Extend the timeout after a request timed out; returns the message for it."""
        was, self._left = self.seconds, self._left[1:] or self._left
        self.apply()
        text = f"the tracker took more than {was} s to answer"
        if self.seconds > was:
            self.moved = now
            return f"{text}; from now on it may take {self.seconds} s"
        return f"{text}; set {TIMEOUT_VARIABLE} to more seconds than that"


class PatientClient:
    """A client whose methods, except `ONCE`, are retried up to `TRIES` times while they fail fast for a passing reason.

    Raises TooSlow for a request that timed out by `limit`.
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
                        self._limit.moved = self._clock()  # a refusal is an answer
                    elif took >= self._limit.seconds and _CUT_OFF.search(str(error)):
                        raise TooSlow(f"{name}: {self._limit.grow(self._clock())}") from error
                    if not left or not is_passing(error) or took > QUICK_SECONDS:
                        raise
                time.sleep(PAUSE_SECONDS)

        return patient


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later: the server failed or was not reached, and did not refuse."""
    code = getattr(error, "error_code", None)
    return isinstance(error, OSError) if code is None else code in PASSING


def pages(search: Callable[..., Any], experiment_ids: list[str], query: str | None) -> Iterator[Any]:
    """All results of one of MLflow's paged searches. Raises TrackingError if the pages never end."""
    token = None
    for _ in range(PAGES):
        found = search(experiment_ids, filter_string=query or "", max_results=PAGE, page_token=token)
        yield from found
        token = found.token
        if not token:
            return
    raise TrackingError("the tracking server's list of results does not end")
