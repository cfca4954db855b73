"""Which store a study means: a directory of its own, a shared one, or a URL.

Invariant: fsspec is imported only for a URL that is no local directory, and no address holds a secret.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from pipeline.errors import ConfigError
from pipeline.store import Store
from pipeline.study.config import Study
from pipeline.study.sections import StorageSection


def store_at(where: str | None, out: Path, always: tuple[str, ...] = ()) -> Store:
    """The store at `storage.store`; None is OUT/store. `always` are fingerprints every step reads besides its inputs."""
    if where is None:
        return Store(out / "store")
    if "://" not in where:
        return Store(Path(where).expanduser())
    if where.startswith(("file://", "local://")):
        return Store(Path(unquote(urlsplit(where).path)))
    from pipeline.store_remote import ObjectStore

    return ObjectStore.at(where, always)


def settled(study: Study) -> Study:
    """The study with its store's directory made absolute: OUT/study.yaml is read from anywhere."""
    where = study.storage.store
    if where is None or "://" in where:
        return study
    absolute = str(Path(where).expanduser().absolute())
    return study.model_copy(update={"storage": StorageSection(store=absolute)})


def store_of(out: Path) -> Store:
    """The store of the run in OUT, as its study.yaml says. Raises ConfigError if that cannot be read."""
    try:
        tree = yaml.safe_load((out / "study.yaml").read_text(encoding="utf-8"))
        return store_at((tree.get("storage") or {}).get("store"), out)
    except FileNotFoundError:
        return store_at(None, out)
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{out / 'study.yaml'} cannot be read ({error}); run the study again to write it anew"
        ) from None
