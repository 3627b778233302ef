"""Coders over several hookpoints: crosscoders, and cross-layer transcoders.

Imports config, kernels and what is beside it in coders. One coder of one hookpoint never needs
anything from here.
"""
