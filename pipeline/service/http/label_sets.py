"""Routes of registered label sets: names and templates that are embedded once and asked for by name.

Invariant: a set that was answered for is there for every serving process, and is ready in the one that answered.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response

from pipeline.files.disk import is_full
from pipeline.service.http.door import require
from pipeline.service.http.inference import Inference
from pipeline.service.http.problems import Problem, busy
from pipeline.service.http.schemas import LabelSetBody, LabelSetNames, LabelSetShown
from workers.serving.batcher import Busy
from workers.serving.labels import NAME, LabelError, LabelSet

Name = Annotated[str, Path(pattern=f"^{NAME.pattern}$")]
MOST_TEMPLATES = 200


def router(model: Inference) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["label sets"])
    sets, limits = model.label_sets, model.limits
    reads, changes = [Depends(require("reader"))], [Depends(require("operator"))]

    @routes.get("/v1/label-sets", dependencies=reads, summary="Names of the registered label sets")
    def names() -> LabelSetNames:
        return LabelSetNames(names=sets.names())

    @routes.get("/v1/label-sets/{name}", dependencies=reads, summary="One label set")
    def show(name: Name) -> LabelSetShown:
        found = sets.get(name)
        if found is None:
            raise Problem("labels.unknown")
        return _shown(name, found)

    @routes.put(
        "/v1/label-sets/{name}",
        dependencies=changes,
        summary="Register a label set, or replace it",
        responses={201: {"model": LabelSetShown, "description": "The name is new"}},
    )
    async def put(name: Name, body: LabelSetBody, response: Response) -> LabelSetShown:
        try:
            labels = LabelSet(tuple(body.names), tuple(body.templates))
        except LabelError as error:
            raise Problem("labels.wrong", str(error)) from None
        many = len(labels.names) > limits.set_labels or labels.prompts > limits.set_prompts
        if many or len(labels.templates) > MOST_TEMPLATES:
            raise Problem(
                "labels.too_many",
                f"a label set has at most {limits.set_labels:,} names, {MOST_TEMPLATES} templates, and {limits.set_prompts:,} prompts",
            )
        try:
            await model.serving.prepare(labels)
            response.status_code = 201 if sets.put(name, labels) else 200
        except Busy as error:
            raise busy("service.busy", error.retry_after) from None
        except LabelError as error:
            raise Problem("labels.wrong", str(error)) from None
        except OSError as error:
            if is_full(error):
                raise Problem("service.full") from None
            raise
        return _shown(name, labels)

    @routes.delete(
        "/v1/label-sets/{name}", dependencies=changes, status_code=204, summary="Forget a label set"
    )
    def remove(name: Name) -> None:
        if not sets.remove(name):
            raise Problem("labels.unknown")

    return routes


def _shown(name: str, labels: LabelSet) -> LabelSetShown:
    return LabelSetShown(
        name=name, digest=labels.digest, names=[*labels.names], templates=[*labels.templates]
    )
