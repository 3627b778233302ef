"""Fast twins of the definitions in coders/functional.py: same names, arguments and numbers.

`Kernels` in twins.py chooses between C (cpu/), Triton (cuda/) and PyTorch's operators. Imports
config alone. No coder, no rank and no definition enters here: the tests hold the twins against
functional.py, which does not know them either.
"""
