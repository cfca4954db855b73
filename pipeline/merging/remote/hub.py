"""A model on a hub that speaks Hugging Face's documented interface: the list of a revision's files, and ranges of them by their resolve URL.

`HF_ENDPOINT` names another hub than huggingface.co, `HF_TOKEN` opens what is private or gated.

Invariant: a token goes to the endpoint alone, never where the endpoint redirects to; every file is of the one commit that was listed.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote

from merge_service.files import web
from pipeline.merging.remote.source import RemoteError

_LISTED = 64 << 20


@dataclass(frozen=True)
class Hub:
    """The model `repository` (OWNER/NAME) at a revision: a branch, a tag or a commit."""

    repository: str
    revision: str = "main"
    endpoint: str = field(
        default_factory=lambda: os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    )

    @property
    def url(self) -> str:
        """With the commit that the revision is now."""
        return f"hf://{self.repository}@{self._listing['sha']}"

    @property
    def name(self) -> str:
        """The model's name without its owner."""
        return self.repository.rpartition("/")[2]

    def files(self) -> Mapping[str, int | None]:
        """As of `Source`."""
        return {str(one["rfilename"]): one.get("size") for one in self._listing.get("siblings", [])}

    def size(self, file: str) -> int:
        """As of `Source`."""
        known = self.files().get(file)
        return int(known) if known is not None else self._range(file, 0, 1)[1]

    def part(self, file: str, start: int, stop: int) -> bytes:
        """As of `Source`."""
        return self._range(file, start, stop)[0] if stop > start else b""

    @cached_property
    def _listing(self) -> dict[str, Any]:
        where = f"{self.endpoint}/api/models/{self.repository}/revision/{quote(self.revision, safe='')}?blobs=true"
        said = f"hf://{self.repository}@{self.revision}"
        answer = self._answered(said, lambda: web.get(where, _token(), _LISTED, follow=True))
        try:
            found = json.loads(answer.data)
            return {"sha": str(found.get("sha") or self.revision), "siblings": list(found["siblings"])}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RemoteError(
                f"{where} answered something else than a list of files; check HF_ENDPOINT ({self.endpoint})"
            ) from None

    def _range(self, file: str, start: int, stop: int) -> tuple[bytes, int]:
        """Bytes of a file, and its size."""
        said = f"hf://{self.repository}/{file}"
        where = (
            f"{self.endpoint}/{self.repository}/resolve/{quote(self._listing['sha'], safe='')}/{quote(file)}"
        )
        answer = self._answered(said, lambda: web.get_range(where, start, stop, _token(), follow=True))
        size = answer.size_of_whole(start, stop)
        if size is None:
            raise RemoteError(
                f"{said}: the server does not give ranges of it, so the whole file would be loaded; `hf download {self.repository}` "
                "first, and give the folder"
            )
        return answer.data, size

    def _answered(self, said: str, once: Callable[[], web.Answer]) -> web.Answer:
        """An answer that is no refusal. Raises `RemoteError`."""
        try:
            answer = web.tried(once)
        except web.Passing as error:
            if error.status is not None:
                raise self._refused(said, error.status) from None
            raise RemoteError(
                f"{said} cannot be read from {self.endpoint}: {error} (tried {web.TRIES} times); check the network and HF_ENDPOINT, or "
                f"`hf download {self.repository}` where there is one, and give the folder"
            ) from None
        if answer.status >= 400:
            raise self._refused(said, answer.status)
        return answer

    def _refused(self, said: str, code: int) -> RemoteError:
        if code in (401, 403):
            what = "the model is private or gated: accept its terms, and set HF_TOKEN"
        elif code == 404:
            what = f"{self.endpoint} has no such file, model or revision; check the name, and HF_TOKEN if it is private"
        elif code == 416:
            what = "the file is shorter than it was; it was changed: merge again"
        else:
            what = "the hub is busy or broken; try again later"
        return RemoteError(f"{said}: {what} (HTTP {code})")


def _token() -> dict[str, str]:
    token = os.environ.get("HF_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}
