"""Scores of checkpoints, and measures of what a base knows about classes before training.

Used from outside: `evaluate` (`evaluate`, `Encoder`), `prompts` (classes with equal tokens), `stream_orders` (`measure`).
"""
