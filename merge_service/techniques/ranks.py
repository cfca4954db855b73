"""Which ranks bound the magnitudes that a technique keeps, of n values: where each convention puts its thresholds.

A rank counts from 1, the smallest; None is no bound. Fractions are the decimals that a person wrote, so that 0.9 of 10 is 9.
"""

from fractions import Fraction

from merge_service.blocks.questions import Ranks


def trim_ranks(density: float) -> Ranks:
    """TIES: keep |tau| >= the int((1 - density) * n)-th smallest; with nothing to drop, everything.

    The convention of ties-merging and TIME: one more than density * n is kept, and all that tie with the threshold.
    """

    def ranks(n: int) -> tuple[int | None, int | None]:
        return _portion(1 - _exact(density), n) or None, None

    return ranks


def band_ranks(density: float, outliers: float) -> Ranks:
    """Breadcrumbs in TIME's convention: without ties exactly n - bottom - top are kept, thresholds included."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        bottom = _portion(max(1 - _exact(density) - _exact(outliers), Fraction(0)), n)
        top = _portion(_exact(outliers), n)
        return (bottom + 1 if bottom else None), (n - top if top else None)

    return ranks


def crumb_ranks(density: float, outliers: float) -> Ranks:
    """Breadcrumbs as released and in MergeKit: without the int(outliers * n) largest, the int(density * n) largest.

    One at least is kept, where the released code keeps nothing and MergeKit loses the whole tensor (outliers * n < 1).
    """

    def ranks(n: int) -> tuple[int | None, int | None]:
        top, keep = _portion(_exact(outliers), n), max(_portion(_exact(density), n), 1)
        bottom = n - top - keep
        return (bottom + 1 if bottom > 0 else None), (n - top if top else None)

    return ranks


def clamp_ranks(winsorize: float) -> Ranks:
    """PCB (pcb-merging.py): the smallest and the largest magnitude that stay; one large value at least is clamped."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        bottom = _portion(_exact(winsorize), n)
        return bottom + 1, max(int(n * (1 - _exact(winsorize)) - 1), bottom) + 1

    return ranks


def score_ranks(density: float) -> Ranks:
    """PCB: the score that counts for nothing, and the largest."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        return min(_portion(1 - _exact(density), n), n - 1) + 1, n

    return ranks


def differing_ranks(density: float, zeros: int) -> Ranks:
    """SCE: the int(density * m)-th largest of the m values that are not zero, one at least; without any, no limit."""

    def ranks(n: int) -> tuple[int | None, int | None]:
        keep = max(_portion(_exact(density), n - zeros), 1)
        return (n - keep + 1 if n > zeros else None), None

    return ranks


def _exact(number: float) -> Fraction:
    """The decimal a person wrote: 0.9 is nine tenths, not the nearest binary fraction."""
    return Fraction(repr(float(number)))


def _portion(fraction: Fraction, n: int) -> int:
    return int(fraction * n)
