"""The kernels in Triton, for CUDA; imported only where there is Triton.

Imports nothing of the package: what comes in and goes out are tensors.
"""
