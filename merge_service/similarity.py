"""How similar experts are: `merge_service.merging.similarity`, under its documented name."""

from merge_service.merging.similarity import CLASH_CONFLICT, CLASH_COSINE, Clash, Similarity, similarity

__all__ = ["CLASH_CONFLICT", "CLASH_COSINE", "Clash", "Similarity", "similarity"]
