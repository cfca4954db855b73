"""A model that answers, and is exchanged for another one while it does.

`Serving` holds one `Snapshot`, follows a `Head` that says which weights are served, and answers `Work` in batches. `Decoder` makes
pictures of files from strangers. HTTP is not known here. Used from outside: `serving`, `served`, `labels`, `decoding`, `batcher`.
"""
