"""MLflow's server with one page more: the door that `temporal-merge ui` opens.

Which of its two views the UI is in is remembered by the browser alone (an address that names one holds for that page only),
and the other view calls models agent versions. The door sets the view for model training, keeps the chat panel shut
unless the browser has been asked about it before, and goes on to the study.

Invariant: nothing of MLflow is changed; the server is on loopback and the page takes a number and nothing else.
"""

import os
from typing import Any

WORD, WORD_HEADER = "TEMPORAL_MERGE_UI", "X-Temporal-Merge-UI"
"""What the door answers with, so that who started this server knows it from another on the port."""
DOOR = "/temporal-merge"
APP = "temporal-merge"
"""The name of this server among MLflow's (entry point group `mlflow.app`, in setup.cfg)."""

_PAGE = """<!doctype html><meta charset="utf-8"><title>temporal-merge</title><script>
localStorage.setItem("mlflow.workflowType_v1", JSON.stringify("machine_learning"));
if (localStorage.getItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1") === null)
  localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
const experiment = new URLSearchParams(location.search).get("experiment") || "";
location.replace("/#/experiments" + (/^[0-9]+$/.test(experiment) ? "/" + experiment + "/runs" : ""));
</script>
"""


def create_app() -> Any:
    """The ASGI application; MLflow's server starts it with `--app-name`."""
    from mlflow.server.fastapi_app import app
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    async def door(request: Any) -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={WORD_HEADER: os.environ.get(WORD, "")})

    app.router.routes.insert(0, Route(DOOR, door))
    return app
