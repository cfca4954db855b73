"""What models see of a split that its bytes alone do not say: how unusual pictures are converted, which samples show the same.

Invariant: a split of ordinary pictures is named by its shards alone, so that a change of how others are treated leaves its
results what they were.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping

from workers.data import pictures
from workers.data.contents import Survey, is_by_caption, repeated
from workers.data.manifest import DatasetInfo, SplitInfo

GROUPING = 1
"""Raise it when retrieval treats samples of the same picture in another way."""
FEW = 0.05
"""A share of samples below which copies of pictures are not worth a word: they cannot move a score by more."""


def content_digest(split: SplitInfo, survey: Survey, scored: bool) -> str:
    """The split's digest, made another one by what is done to its pictures where they are not plain.

    `scored`: for evaluation, where captions of one picture that come as several samples count together.
    """
    how = {}
    if any(kind in pictures.CONVERTED for kind, _ in survey.pictures):
        how["pictures"] = pictures.REVISION
    if scored and is_by_caption(survey.files):
        how["captions"] = GROUPING
    if not how:
        return split.digest
    return hashlib.sha256(json.dumps([split.digest, how], sort_keys=True).encode()).hexdigest()


def notes(info: DatasetInfo, surveys: Mapping[str, Survey]) -> list[str]:
    """What a person should know of a dataset before its scores are believed, a sentence each."""
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
    """How samples that show the same picture are scored, where that can move a score."""
    copies = repeated(survey.files)
    if is_by_caption(survey.files):
        return [
            f"the {survey.samples:,} samples of {split} show {len(set(survey.files)):,} pictures; samples of the same picture are "
            "scored as one picture that has all their captions"
        ]
    if copies < FEW * survey.samples or not copies:
        return []
    return [
        f"{copies:,} of {survey.samples:,} samples of {split} show a picture that another shows too, and each is scored as a picture of "
        "its own; write each picture once, with all its captions, one a line"
    ]
