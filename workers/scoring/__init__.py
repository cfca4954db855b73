"""How good a model is: scores of a checkpoint, and what a base knows of classes before anything is trained.

Used from outside: `evaluate` (`evaluate`, `Encoder`), `prompts` (classes that a tokenizer reads as one), `stream_orders` (`measure`).
"""
