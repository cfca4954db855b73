"""Models as directories of weights: where a base comes from, what its configuration may contain, and how a network is built.

Used from outside: `base` (what is known of a base before its weights are read: `find`, `Base`), `configuration` (files read by
allow-list), `export` (`export_base`), `model` (`load`, `save`, `set_trainable`), `weights` (the files of a weights directory).
"""
