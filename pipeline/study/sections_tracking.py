"""The `tracking` section of a study file: the MLflow server or database, and the model that is registered there.

Invariant: the section holds no secret, and its addresses and names are valid in MLflow.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from pipeline.files.paths import expanded
from pipeline.study.addresses import CREDENTIALS, refuse_secret, refuse_unusable_tracker
from pipeline.study.sections import Name, Section, Text

_ALIAS = re.compile(r"[A-Za-z0-9_-]{1,255}")
_VERSION = re.compile(r"v[0-9]+", re.IGNORECASE)


def _alias(value: str) -> str:
    if not _ALIAS.fullmatch(value) or value.lower() == "latest" or _VERSION.fullmatch(value):
        raise ValueError(
            f"{value[:60]!r} is not a valid alias in MLflow; use letters, digits, '_' and '-', and neither 'latest' nor v and a number"
        )
    return value


class RegistrySection(Section):
    """The MLflow model registry, used at the end of a study.

    The trajectory with the best `by` at its last t (mean over seeds) becomes a version of the registered model `name`
    (null: the study's name), and `alias` points to it.
    """

    name: Name | None = None
    by: Literal["gm", "ka", "zs"] = "gm"
    alias: Annotated[str, AfterValidator(_alias)] = "best"


class TrackingSection(Section):
    """MLflow: `uri` null is a sqlite database in OUT, `log_weights` also uploads merged weights, `registry` null
    registers nothing.
    """

    uri: Annotated[Text, AfterValidator(expanded)] | None = None
    experiment: Text | None = None
    log_weights: bool = True
    registry: RegistrySection | None = RegistrySection()

    @model_validator(mode="after")
    def _usable(self) -> Self:
        refuse_unusable(self.uri)
        return self


def refuse_unusable(uri: str | None) -> None:
    """Raise ValueError for the address of a tracker that holds a secret, or that MLflow cannot use."""
    if uri is not None:
        refuse_secret("uri", uri, CREDENTIALS)
        refuse_unusable_tracker(uri)
