"""Routes that ask the model: classify, embed.

Pictures come as the body, or several as parts of a form. They are decoded before they take a place in the queue.
Invariant: a request is answered by one snapshot, which the headers name; a client that goes away takes its work out of the queue.
"""

import asyncio
import secrets
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile

from pipeline.service.http.door import LEFT, require
from pipeline.service.http.problems import Mistake, Problem, busy, not_valid
from pipeline.service.http.schemas import AskedLabels, Body, Classified, Embedded, Likely, Model, Seen, Texts
from pipeline.service.settings import LimitsSection
from workers.serving.batcher import Busy, Closed
from workers.serving.decoding import Decoder, PictureRefused
from workers.serving.labels import DEFAULT_TEMPLATES, LabelError, LabelSet, LabelSets
from workers.serving.serving import NothingServed, Serving
from workers.serving.snapshot import Answer, Work

TYPES = ("image/jpeg", "image/png", "image/webp")
FORM = "multipart/form-data"
PART = "image"
"""Name of a part that is a picture."""
T = TypeVar("T")
Asked = TypeVar("Asked", bound=BaseModel)


class Nothing(Body):
    """No field but pictures."""


@dataclass(frozen=True)
class Inference:
    """What the routes of one process share."""

    serving: Serving
    decoder: Decoder
    label_sets: LabelSets
    limits: LimitsSection


def body_of(form: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says about a body of pictures, which FastAPI cannot know: a picture, or a form with `form`'s fields beside pictures."""
    schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
    picture = {"type": "string", "format": "binary"}
    fields = {**schema.get("properties", {}), PART: {"type": "array", "items": picture, "minItems": 1}}
    content: dict[str, Any] = {name: {"schema": picture} for name in TYPES}
    content[FORM] = {
        "schema": {"type": "object", "properties": fields, "required": [PART], "additionalProperties": False}
    }
    return {"requestBody": {"required": True, "content": content}}


def router(model: Inference) -> APIRouter:
    """The routes."""
    routes = APIRouter(dependencies=[Depends(require("reader"))], tags=["inference"])

    @routes.post(
        "/v1/classify", openapi_extra=body_of(AskedLabels), summary="What pictures show, of given labels"
    )
    async def classify(
        request: Request, response: Response, asked: Annotated[AskedLabels, Query()]
    ) -> Classified:
        files, asked = await _pictures(request, asked, model.limits)
        labels = _labels(asked, model)
        images = await _decoded(model, files)
        answer = await _answered(request, model, Work(images=images, labels=labels))
        return Classified(model=_named(response, answer), results=_seen(answer, labels, asked.top))

    @routes.post("/v1/embed/image", openapi_extra=body_of(Nothing), summary="Vectors of pictures")
    async def embed_image(
        request: Request, response: Response, asked: Annotated[Nothing, Query()]
    ) -> Embedded:
        files, _ = await _pictures(request, asked, model.limits)
        images = await _decoded(model, files)
        answer = await _answered(request, model, Work(images=images))
        return Embedded(model=_named(response, answer), embeddings=answer.values.tolist())

    @routes.post("/v1/embed/text", summary="Vectors of texts")
    async def embed_text(request: Request, response: Response, asked: Texts) -> Embedded:
        if len(asked.texts) > model.limits.texts:
            raise Problem("request.invalid", f"a request brings at most {model.limits.texts} texts")
        answer = await _answered(request, model, Work(texts=tuple(asked.texts)))
        return Embedded(model=_named(response, answer), embeddings=answer.values.tolist())

    return routes


async def _pictures(request: Request, query: Asked, limits: LimitsSection) -> tuple[list[bytes], Asked]:
    """The files of a request, and what it asks: of the query, or of the form where it has fields. Raises Problem."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in TYPES:
        files = [await request.body()]
    elif kind == FORM:
        boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary")
        end = b"--%s--" % (boundary or b"")
        if not (await request.body()).rstrip().endswith(end):  # a part that was cut off would be passed over
            raise Problem("request.malformed", "the form has no boundary, or no end")
        form = await request.form(
            max_files=4 * limits.pictures, max_fields=limits.labels + 200, max_part_size=8 << 10
        )
        try:
            files = [await part.read() for part in form.getlist(PART) if isinstance(part, UploadFile)]
            query = _of_form(form, query)
        finally:
            await form.close()
    else:
        raise Problem("request.media_type", f"pictures come as {', '.join((*TYPES, FORM))}")
    if not any(files):
        raise Problem("picture.missing")
    if len(files) > limits.pictures:
        raise Problem("picture.too_many", f"a request brings at most {limits.pictures} pictures")
    return files, query


def _of_form(form: FormData, query: Asked) -> Asked:
    """The fields of a form, which then takes the place of the query. Raises Problem."""
    fields: dict[str, Any] = {}
    several = {name for name, field in type(query).model_fields.items() if "list" in str(field.annotation)}
    for name, value in form.multi_items():
        if name == PART and isinstance(value, UploadFile):
            continue
        if not isinstance(value, str) or (name in fields and name not in several):
            raise Problem("request.invalid", f"the field {name[:80]!r} is a file, or is there twice")
        if name in several:
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = value
    if fields and query.model_fields_set:
        raise Problem("request.invalid", "fields come in the query or in the form, not in both")
    try:
        return type(query).model_validate(fields) if fields else query
    except ValidationError as error:
        raise not_valid(error.errors()) from None


def _labels(asked: AskedLabels, model: Inference) -> LabelSet:
    try:
        if asked.label_set is not None:
            if asked.labels or asked.templates:
                raise LabelError("give labels and templates, or a label_set, not both")
            found = model.label_sets.get(asked.label_set)
            if found is None:
                raise Problem("labels.unknown")
            return found
        if not asked.labels:
            raise Problem("labels.missing")
        labels = LabelSet(tuple(asked.labels), tuple(asked.templates) or DEFAULT_TEMPLATES)
    except LabelError as error:
        raise Problem("labels.wrong", str(error)) from None
    limits = model.limits
    if len(labels.names) > limits.labels or labels.prompts > limits.prompts:
        raise Problem(
            "labels.too_many",
            f"a request brings at most {limits.labels:,} labels, and {limits.prompts:,} prompts (labels times templates)",
        )
    return labels


async def _decoded(model: Inference, files: list[bytes]) -> np.ndarray:
    """uint8 [n, H, W, 3]. Raises Problem naming every picture that is refused."""
    found = await asyncio.gather(*map(model.decoder.decode, files), return_exceptions=True)
    wrong = [(at, one) for at, one in enumerate(found) if isinstance(one, PictureRefused)]
    if wrong:
        first = wrong[0][1]
        mistakes = [Mistake(pointer=f"/{PART}/{at}", detail=f"{one.code}: {one.detail}") for at, one in wrong]
        raise Problem(first.code, f"picture {wrong[0][0]}: {first.detail}", mistakes)
    for one in found:
        if isinstance(one, Busy):
            raise busy("service.busy", one.retry_after)
        if isinstance(one, BaseException):
            raise one
    return np.stack([one for one in found if isinstance(one, np.ndarray)])


async def _answered(request: Request, model: Inference, work: Work) -> Answer:
    """The model's answer. Raises Problem."""
    try:
        answering = model.serving.answer(work, _session(request))
        return await _while_connected(request, answering, model.limits.answer_s)
    except NothingServed:
        raise busy("model.none", 5) from None
    except Busy as error:
        raise busy("service.busy", error.retry_after) from None
    except Closed:
        raise busy("service.ending", 1) from None
    except TimeoutError:
        raise busy("service.slow", 5) from None
    except FloatingPointError:
        raise Problem("model.not_finite") from None


def _session(request: Request) -> str:
    """What decides whether a candidate answers: the same session is always answered by the same model."""
    return request.headers.get("x-session") or request.headers.get("x-request-id") or secrets.token_hex(8)


async def _while_connected(request: Request, asked: Awaitable[T], seconds: float) -> T:
    """The result, unless it takes longer (TimeoutError) or the client goes away (then nobody reads what is answered)."""
    working = asyncio.ensure_future(asked)
    leaving = asyncio.ensure_future(_left(request))
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        request.scope[LEFT] = leaving in done
        raise TimeoutError
    finally:
        for one in (working, leaving):
            one.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _named(response: Response, answer: Answer) -> Model:
    model = Model.of(answer.served)
    response.headers.update(model.headers())
    return model


def _seen(answer: Answer, labels: LabelSet, top: int) -> list[Seen]:
    found = []
    for row in answer.values:
        order = np.argsort(-row, kind="stable")[:top].tolist()
        likely = [Likely(label=labels.names[at], probability=float(row[at])) for at in order]
        found.append(Seen(label=likely[0].label, probability=likely[0].probability, top=likely))
    return found
