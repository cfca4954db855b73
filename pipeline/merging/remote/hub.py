"""A model on a hub that speaks Hugging Face's documented interface: the list of a revision's files, and ranges of them by their resolve URL.

`HF_ENDPOINT` names another hub than huggingface.co, `HF_TOKEN` opens what is private or gated.

Invariant: a token goes to the endpoint alone, never where the endpoint redirects to; every file is of the one commit that was listed.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from pipeline.merging.remote.source import RemoteError

TRIES, PAUSE, TIMEOUT = 4, 0.5, 60
_LISTED = 64 << 20
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _WithoutToken(urllib.request.HTTPRedirectHandler):
    """Follows redirects; another host gets no token."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            made.remove_header("Authorization")
        return made


_opener = urllib.request.build_opener(_WithoutToken)


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
        answer, _ = self._read(where, f"hf://{self.repository}@{self.revision}", {}, _LISTED)
        try:
            found = json.loads(answer)
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
        data, given = self._read(where, said, {"Range": f"bytes={start}-{stop - 1}"}, stop - start)
        found = _RANGE.fullmatch(given or "")
        if found is None or int(found[1]) != start or len(data) != min(stop, int(found[3])) - start:
            raise RemoteError(
                f"{said}: the server does not give ranges of it, so the whole file would be loaded; `hf download {self.repository}` "
                "first, and give the folder"
            )
        return data, int(found[3])

    def _read(self, where: str, said: str, headers: Mapping[str, str], most: int) -> tuple[bytes, str | None]:
        """The answer, and its Content-Range. Raises `RemoteError`."""
        asked = urllib.request.Request(where, headers={"User-Agent": "temporal-merge", **headers})
        if token := os.environ.get("HF_TOKEN"):
            asked.add_header("Authorization", f"Bearer {token}")
        for attempt in range(1, TRIES + 1):
            try:
                with _opener.open(asked, timeout=TIMEOUT) as answer:
                    data = answer.read(most + 1)
                    if len(data) < min(int(answer.headers.get("Content-Length") or 0), most):
                        raise OSError(f"the connection ended after {len(data)} bytes")
                    return data, answer.headers.get("Content-Range")
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503, 504) or attempt == TRIES:
                    raise self._refused(said, error.code) from None
            except (OSError, HTTPException) as error:  # refused, cut, timed out; URLError is one
                if attempt == TRIES:
                    raise RemoteError(
                        f"{said} cannot be read from {self.endpoint}: {getattr(error, 'reason', error)} (tried {attempt} times); check the "
                        f"network and HF_ENDPOINT, or `hf download {self.repository}` where there is one, and give the folder"
                    ) from None
            time.sleep(PAUSE * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _refused(self, said: str, code: int) -> RemoteError:
        if code in (401, 403):
            what = "the model is private or gated: accept its terms, and set HF_TOKEN"
        elif code == 404:
            what = f"{self.endpoint} has no such file, model or revision; check the name, and HF_TOKEN if it is private"
        else:
            what = "the hub is busy or broken; try again later"
        return RemoteError(f"{said}: {what} (HTTP {code})")
