"""The `tracking` section of a study file: which MLflow, and what is registered there.

Invariant: no secret gets past this; addresses and names are ones that MLflow takes.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from pipeline.addresses import CREDENTIALS, refuse_secret, refuse_unusable_tracker
from pipeline.places import expanded
from pipeline.sections import Name, Section, Text

_ALIAS = re.compile(r"[A-Za-z0-9_-]{1,255}")
_VERSION = re.compile(r"v[0-9]+", re.IGNORECASE)


def _alias(value: str) -> str:
    if not _ALIAS.fullmatch(value) or value.lower() == "latest" or _VERSION.fullmatch(value):
        raise ValueError(
            f"{value[:60]!r} is no alias in MLflow; use letters, digits, '_' and '-', and neither 'latest' nor v and a number"
        )
    return value


class RegistrySection(Section):
    """The MLflow model registry: at the end of a study the trajectory with the best `by` at its last t (mean over seeds)
    becomes a version of the registered model `name` (null: the study's name), and `alias` points to it."""

    name: Name | None = None
    by: Literal["gm", "ka", "zs"] = "gm"
    alias: Annotated[str, AfterValidator(_alias)] = "best"


class TrackingSection(Section):
    """MLflow: `uri` null keeps a sqlite store in OUT; `log_weights` also sends the merged weights there; `registry` null
    registers nothing."""

    uri: Annotated[Text, AfterValidator(expanded)] | None = None
    experiment: Text | None = None
    log_weights: bool = True
    registry: RegistrySection | None = RegistrySection()

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.uri is not None:
            refuse_secret("uri", self.uri, CREDENTIALS)
            refuse_unusable_tracker(self.uri)
        return self
