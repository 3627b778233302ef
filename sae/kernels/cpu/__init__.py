"""The kernels in C, compiled for this machine when they are first needed.

Imports nothing of the package: what comes in and goes out are tensors.
"""
