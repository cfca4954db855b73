"""Which store a study means: a directory of its own, a shared one, or a URL.

Invariant: fsspec is imported only for a URL that is no local directory, and no address holds a secret.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.store.local import Store


def store_at(where: str | None, out: Path, always: tuple[str, ...] = ()) -> Store:
    """The store at `storage.store`; None is OUT/store. `always` are fingerprints every step reads besides its inputs."""
    if where is None:
        return Store(out / "store")
    if "://" not in where:
        return Store(Path(where).expanduser())
    if where.startswith(("file://", "local://")):
        return Store(Path(unquote(urlsplit(where).path)))
    from pipeline.store.remote import ObjectStore

    return ObjectStore.at(where, always)
