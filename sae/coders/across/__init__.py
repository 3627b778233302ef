"""Coders over several hookpoints: crosscoders, and cross-layer transcoders.

Imports config, kernels, formats and what is beside it in coders. Nothing of a launch, of an LM or
of a run's files is here: what other ranks send comes through `passing.Post`.
"""
