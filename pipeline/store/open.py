"""The store of a study: a directory of its own, a shared directory, or a URL.

Invariant: fsspec is imported only for a URL that is not a local directory, and no address holds a secret.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.store.local import CACHE_BYTES, Store


def store_at(
    where: str | None, out: Path, always: tuple[str, ...] = (), cache_bytes: int = CACHE_BYTES
) -> Store:
    """The store at `storage.store`; None is OUT/store. `always` are fingerprints that every step reads besides its inputs."""
    if where is None:
        return Store(out / "store", cache_bytes=cache_bytes)
    if "://" not in where:
        return Store(Path(where).expanduser(), cache_bytes=cache_bytes)
    if not is_url(where):
        return Store(Path(unquote(urlsplit(where).path)), cache_bytes=cache_bytes)
    from pipeline.store.remote import ObjectStore

    return ObjectStore.at(where, always)


def is_url(where: str | None) -> bool:
    """Whether a store is no directory of a machine."""
    return where is not None and "://" in where and not where.startswith(("file://", "local://"))
