"""MLflow's server with one additional page, which `temporal-merge ui` opens.

Only the browser stores which of its two views the UI is in (an address that names a view applies to that page only), and the
other view calls models agent versions. The page sets the view for model training, keeps the chat panel closed unless the browser
has seen its question before, and redirects to the study.

It is one process that imports MLflow once; `mlflow server` imports it twice, one after the other, and starts job runners.

Invariant: MLflow itself is not changed; the server listens on loopback, and the page accepts a number and nothing else.
"""

import os
import sys
from typing import Any

WORD, WORD_HEADER = "TEMPORAL_MERGE_UI", "X-Temporal-Merge-UI"
"""The page's response header, by which the process that started this server recognises it on the port."""
DOOR = "/temporal-merge"

_PAGE = """<!doctype html><meta charset="utf-8"><title>temporal-merge</title><script>
localStorage.setItem("mlflow.workflowType_v1", JSON.stringify("machine_learning"));
if (localStorage.getItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1") === null)
  localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
const experiment = new URLSearchParams(location.search).get("experiment") || "";
location.replace("/#/experiments" + (/^[0-9]+$/.test(experiment) ? "/" + experiment + "/runs" : ""));
</script>
"""


def serve_ui(uri: str, artifacts: str, host: str, port: int) -> None:
    """Serve the tracking store at `uri` until a signal; artifacts of new experiments are at `artifacts`."""
    os.environ |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "_MLFLOW_SGI_NAME": "uvicorn"}
    import uvicorn
    from mlflow import server

    stores = (server.BACKEND_STORE_URI_ENV_VAR, server.REGISTRY_STORE_URI_ENV_VAR)
    os.environ |= {**dict.fromkeys(stores, uri), server.ARTIFACT_ROOT_ENV_VAR: artifacts}
    uvicorn.run(create_app(), host=host, port=port, log_level="warning")


def create_app() -> Any:
    """The ASGI application: MLflow's, with the additional page."""
    from mlflow.server.fastapi_app import app
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    async def door(request: Any) -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={WORD_HEADER: os.environ.get(WORD, "")})

    app.router.routes.insert(0, Route(DOOR, door))
    return app


if __name__ == "__main__":
    serve_ui(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
