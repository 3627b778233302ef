"""Text to tokens to numbered blocks, and which blocks a step sees.

Imports config alone. The order of blocks is a function of seed and step; no state of a run, no
language model and no rank enters here.
"""
