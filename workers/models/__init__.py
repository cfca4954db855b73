"""Models as directories of weights: where a base comes from, what its configuration may say, and how a network is made from both.

Used from outside: `base` (what is known of a base before its weights are read: `find`, `Base`), `configuration` (files read by
allow-list), `export` (`export_base`), `model` (`load`, `save`, `set_trainable`), `weights` (the files of a weights directory).
"""
