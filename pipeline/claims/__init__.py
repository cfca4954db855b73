"""TIME's claims held against the studies of configs/studies/time_claims: `python -m pipeline.claims`, or `make reproduce`."""
