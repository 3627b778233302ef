"""The frozen language model: load it, name its modules, capture rows, splice reconstructions in.

Imports config alone. No coder enters here: what is captured are rows, and what is spliced in comes
from functions.
"""
