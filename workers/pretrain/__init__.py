"""Pretraining of the base checkpoints in this repository, each from its recipe by one command (`python -m workers.pretrain`).

`base` trains, `recipe` reads the recipe and decides when training ends, `page` writes the page with the scores. Used from
outside: `pretrain`.
"""

from merge_service.moved import names_from
from workers.pretrain.base import pretrain

__all__ = ["pretrain"]

__getattr__ = names_from("workers.pretrain.base")
