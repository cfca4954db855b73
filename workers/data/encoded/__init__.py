"""Pictures as they are stored: an index of a split's shards, and pictures that are decoded when a batch asks for them.

`index` finds once where every sample lies, `shards` reads samples by their number, `pictures` decodes them: at a model's size as the
decoded cache holds them, or cut out of the original picture for training. `addresses` says where shards may be besides folders, `remote`
reads them there. Used from outside: `split_of_shards`, `Pictures`, `FORMAT`.
"""
