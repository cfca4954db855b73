"""Bodies of requests and answers of serving.

Invariant: a text that passed a schema can be encoded as UTF-8 and is bounded; an answer names the model that gave it.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from merge_service.live import State, backlog, to_retrain
from workers.serving.labels import DEFAULT_TEMPLATES
from workers.serving.served import Served

MOST_CHARACTERS = 1000
"""Of a text, a label or a template: a tokenizer reads far fewer."""


def _plain(text: str) -> str:
    if "\x00" in text or (
        not text.isprintable() and not text.replace("\n", " ").replace("\t", " ").isprintable()
    ):
        raise ValueError("holds characters that cannot be printed")
    return text


Text = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS), AfterValidator(_plain)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Body(BaseModel):
    """A body whose unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid")


class Model(BaseModel):
    """The weights that gave an answer."""

    t: int
    sha256: Digest
    arrival: str

    @classmethod
    def of(cls, served: Served) -> "Model":
        """The weights of a snapshot."""
        return cls(t=served.t, sha256=served.sha256, arrival=served.arrival)

    def headers(self) -> dict[str, str]:
        """X-Model-T, X-Model-Sha256, X-Arrival."""
        return {"x-model-t": str(self.t), "x-model-sha256": self.sha256, "x-arrival": self.arrival}


class AskedTop(Body):
    """How many labels an answer lists."""

    top: Annotated[
        int, Field(ge=1, le=100, description="Labels that are listed for each picture, the likeliest first")
    ] = 5


class AskedLabels(AskedTop):
    """What pictures may show: `labels` with `templates`, or the registered `label_set`."""

    labels: list[Text] = Field(default=[], description="Distinct names of what a picture may show")
    label_set: Annotated[
        str | None, Field(max_length=64, description="Name of a registered set, instead of labels")
    ] = None
    templates: list[Text] = Field(
        default=[],
        description=f"Sentences with {{c}} in the place of a label; by default {DEFAULT_TEMPLATES[0]!r}",
    )


class Likely(BaseModel):
    """A label and its probability, in [0, 1]."""

    label: str
    probability: float


class Seen(BaseModel):
    """What one picture shows: the likeliest label, and the likeliest few."""

    label: str
    probability: float
    top: list[Likely]


class Classified(BaseModel):
    """The answer of classify: one entry for each picture, in their order. Probabilities are the softmax over all labels of the scaled
    cosines."""

    model: Model
    results: list[Seen]


class Embedded(BaseModel):
    """The answer of embed: one normalised vector for each picture or text, in their order."""

    model: Model
    embeddings: list[list[float]]


class Texts(Body):
    """Texts to embed."""

    texts: Annotated[list[Text], Field(min_length=1)]


class LabelSetBody(Body):
    """Names and templates of a label set."""

    names: Annotated[list[Text], Field(min_length=1)]
    templates: Annotated[list[Text], Field(min_length=1)] = [*DEFAULT_TEMPLATES]


class LabelSetShown(LabelSetBody):
    """A registered label set."""

    name: str
    digest: Digest


class LabelSetNames(BaseModel):
    """The names of all registered label sets, in order."""

    names: list[str]


class File(BaseModel):
    """A file of a model."""

    name: str
    bytes: int
    sha256: Digest


class Manifest(BaseModel):
    """A model that can be downloaded: `files` are a weights directory."""

    t: int
    sha256: Digest
    arrival: str
    seq: int
    files: list[File]


class Serves(BaseModel):
    """What this process serves; `wanted` differs while it loads or cannot load, and `problem` then says why (a code)."""

    served: Model | None
    wanted: Model | None
    problem: str | None


class VersionShown(BaseModel):
    """What is deployed after t experts; `arrival` brought it, for `task`. `sha256` is empty where it must be made again first."""

    t: int
    sha256: str
    arrival: str
    task: str


class Standing(BaseModel):
    """How the service `name` stands after entry `seq` of its log. `t` counts the accepted experts, `backlog` arrivals on their way;
    `retrain` are arrivals that were removed with an ancestor and are to be trained again."""

    name: str
    seq: int
    head: str
    t: int
    served: VersionShown
    challenger: str | None
    on_hold: bool
    removal: str | None
    asked: int | None
    backlog: dict[str, int]
    retrain: list[str]

    @classmethod
    def of(cls, state: State) -> "Standing":
        """How it stands by a state of the log."""
        served, challenger, arrival = state.served, state.challenger, state.served.arrival
        task = state.arrivals[arrival].task if arrival else ""
        return cls(
            name=state.name, seq=state.seq, head=state.head, t=state.t, on_hold=state.on_hold, backlog=backlog(state),
            served=VersionShown(t=served.t, sha256=served.sha256, arrival=arrival or "", task=task),
            challenger=challenger.id if challenger else None,
            removal=state.removal.arrival if state.removal else None,
            asked=state.asked.t if state.asked else None, retrain=[*to_retrain(state)],
        )  # fmt: skip

    def lines(self) -> Iterator[str]:
        """What a person reads."""
        yield f"service {self.name}: t = {self.served.t} of {self.t} is served, sha256 {self.served.sha256}"
        if self.served.arrival:
            yield f"it came with {self.served.arrival} ({self.served.task})"
        if self.on_hold:
            yield "promotion is on hold"
        if self.removal:
            yield f"the removal of {self.removal} is under way"
        yield from (f"{count} {name}" for name, count in self.backlog.items())
        if self.retrain:
            yield f"to be trained again: {', '.join(self.retrain)}"


class Status(BaseModel):
    """What runs. `process` is the one of `workers` that answered; `serving`, `waiting` and `queue` (pictures and texts) are its own.
    `live` is how the service stands, where arrivals are taken."""

    service: str
    process: str
    serving: Serves
    waiting: int
    queue: int
    workers: int
    label_sets: list[str]
    live: Standing | None = None


class Ready(BaseModel):
    """A probe's answer."""

    ready: bool


class Healthy(BaseModel):
    """A probe's answer."""

    ok: bool
