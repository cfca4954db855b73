"""Merge recipes: a YAML file that says how a model is made of others, ours or mergekit's, and how it is carried out.

Used from outside: `read` (`read_recipe`), `model` (`Recipe`, `Merge`), `carry_out` (`merge_recipe`), `card` (what a merge of files
writes beside its weights).
"""
