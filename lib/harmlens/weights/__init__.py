"""Pruning: what is stored in a model's weights.

In: a model and examples of an ability. Out: scores, masks, and what is left without the masked weights.
"""
