"""Coefficients of a merge that are learned on images of the tasks: AdaMerging, SUPERMERGE, DAM, concrete masks, tinted heads.

Used from outside: `wanted` (`METHODS`, and `Wanted`, a method with its parameters: without torch), `learn` (a file of coefficients from
experts and arrays), `sources` (the same from tasks' data, and the learn steps of a study).
"""
