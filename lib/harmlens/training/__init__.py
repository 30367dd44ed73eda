"""Teaching a model: fine-tuning, relearning, bad advice, and the organisms themselves.

In: a model and rows to learn. Out: the taught model, its losses, checkpoints.
"""
