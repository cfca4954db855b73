"""Image data: shards on disk, decoded once, served in deterministic batches.

`manifest` and `tarscan` know what is on disk and refuse damaged or dangerous shards; they need no torch. `decode` turns a
split into a cached uint8 array, `mixture` and `batches` turn arrays into training batches that depend on nothing but
(seed, step, rank). `mini` writes the small real-image suite of the demo.
"""
