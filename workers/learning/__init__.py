"""Coefficients of a merge that are learned on images of the tasks: AdaMerging, SUPERMERGE, DAM, concrete masks, tinted heads.

Used from outside: `learn` (a file of coefficients from experts and arrays), `Wanted` (a method with its parameters), `METHODS`.
"""

from workers.learning.learn import Learned, Where, learn
from workers.learning.wanted import METHODS, Wanted

__all__ = ["METHODS", "Learned", "Wanted", "Where", "learn"]
