"""A run on disk: its folder and lock, checkpoints, best coders, summary; and what one would hold.

Imports config, formats, coders, lm, placement and training. Nothing here computes a loss.
"""
