"""The corpus of hostile inputs, which once did harm or must never do any: see corpus/README.md."""

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def _of(kind: str, ending: str) -> list[Path]:
    found = sorted((CORPUS / kind).glob(f"*{ending}"))
    assert found, f"the corpus has no {kind}"
    return found


def studies() -> list[Path]:
    """Study files, each to be refused with ConfigError."""
    return _of("studies", ".yaml")


def checkpoints() -> list[Path]:
    """Checkpoints, each to be refused with CorruptCheckpoint."""
    return _of("checkpoints", ".safetensors")


def shards() -> list[Path]:
    """Shards named REASON-what.tar, each to be refused with a ShardError of that reason."""
    return _of("shards", ".tar")


def records() -> list[Path]:
    """Records of artifacts, each to be refused with CorruptArtifact."""
    return _of("records", ".json")
