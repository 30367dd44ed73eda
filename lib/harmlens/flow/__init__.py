"""Mediation: what flows through a model, and what changes where it is patched, removed or turned.

In: a model, prompt pairs, an outcome. Out: effects by layer, module, position, neuron, direction.
"""
