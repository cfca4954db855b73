"""Image data: shards on disk, read into arrays or on demand, and sampled into deterministic batches.

`manifest` and `tarscan` describe the files and refuse damaged or dangerous shards; neither needs torch. `decode` opens a split,
as a cached uint8 array or as it is stored (`encoded/`). `mixture` and `batches` draw training batches that depend on
(seed, step, rank) only. `importing/` makes a dataset from a user's files. `mini/` writes the small real-image suite of the demo.
"""
