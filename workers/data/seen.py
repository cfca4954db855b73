"""Digests and notes for what models see of a split beyond its bytes: converted pictures, repeated pictures, how pictures are read.

Some results depend on how this project treats unusual pictures, so a change of that treatment must change their digests.
Invariant: the digest of a split of ordinary pictures depends on its shards only, so such a change does not affect its results.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping

from workers.data import pictures
from workers.data.contents import Survey, is_by_caption, repeated
from workers.data.manifest import DatasetInfo, SplitInfo

GROUPING = 1
"""Increase it when retrieval treats samples of the same picture differently."""
ENCODED = 1
"""Increase it when the cropping or resizing of original pictures changes."""
AUTO_SAMPLES = 200_000
"""The number of samples from which `auto` reads a split encoded: decoded at 224 px it would take 30 GB."""
FEW = 0.05
"""The share of samples below which repeated pictures are not reported: they cannot change a score by more."""


def content_digest(split: SplitInfo, survey: Survey, scored: bool) -> str:
    """The digest of a split; if it has converted or regrouped pictures, it also covers the revision of that treatment.

    `scored` is for evaluation, in which captions of one picture that occur in several samples count together.
    """
    how = {}
    if any(kind in pictures.CONVERTED for kind, _ in survey.pictures):
        how["pictures"] = pictures.REVISION
    if scored and is_by_caption(survey.files):
        how["captions"] = GROUPING
    if not how:
        return split.digest
    return hashlib.sha256(json.dumps([split.digest, how], sort_keys=True).encode()).hexdigest()


def reads_encoded(reading: str, samples: int) -> bool:
    """Whether a split of `samples` samples is read encoded, given the study's `decoded`, `encoded` or `auto`."""
    return reading == "encoded" or (reading == "auto" and samples >= AUTO_SAMPLES)


def encoded_digest(split: SplitInfo) -> str:
    """The digest of what training sees of an encoded split, whose crops are taken from the original pictures.

    It always covers the treatment of unusual pictures, so a plan needs no survey of the shards.
    """
    how = {"encoded": ENCODED, "pictures": pictures.REVISION}
    return hashlib.sha256(json.dumps([split.digest, how], sort_keys=True).encode()).hexdigest()


def notes(info: DatasetInfo, surveys: Mapping[str, Survey]) -> list[str]:
    """Caveats for the reader of a dataset's scores, one sentence each."""
    said = []
    counts = Counter(info.classes)
    for name in (name for name, count in counts.items() if count > 1):
        lines = ", ".join(str(at) for at, other in enumerate(info.classes, start=1) if other == name)
        said.append(f"classnames.txt has {name!r} in lines {lines}; these classes cannot be told apart")
    for split, survey in surveys.items():
        for kind, count in survey.pictures:
            what = f"{count:,} of {survey.samples:,} pictures of {split} are {kind}"
            said.append(f"{what}: {pictures.KINDS[kind]}")
        if split != "train":
            said += _of_copies(split, survey)
    return [f"dataset {info.name!r}: {text}" for text in said]


def _of_copies(split: str, survey: Survey) -> list[str]:
    """How samples of the same picture are scored, if that can change a score."""
    copies = repeated(survey.files)
    if is_by_caption(survey.files):
        return [
            f"the {survey.samples:,} samples of {split} show {len(set(survey.files)):,} pictures; samples of the same picture are "
            "scored as one picture that has all their captions"
        ]
    if copies < FEW * survey.samples or not copies:
        return []
    return [
        f"{copies:,} of {survey.samples:,} samples of {split} show a picture that another sample also shows, and each is scored as a "
        "separate picture; write each picture once, with all its captions, one per line"
    ]
