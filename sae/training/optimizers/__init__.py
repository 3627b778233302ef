"""The rules that move weights, each as torch optimizers are; `optim.py` gives them to coders.

Imports kernels, coders and formats.
"""
