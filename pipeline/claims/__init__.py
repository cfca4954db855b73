"""Tests of TIME's claims with the studies of configs/studies/time_claims: `python -m pipeline.claims`, or `make reproduce`."""
