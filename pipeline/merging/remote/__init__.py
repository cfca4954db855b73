"""Inputs of a merge that are not on this machine: `hf://OWNER/NAME`, `s3://bucket/folder`. They are read by range while they are merged.

Used from outside: `near.near`, which gives every remote input a folder of this machine, and `near.with_slashes`.
"""
