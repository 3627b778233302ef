"""Sparse autoencoders and transcoders: the coders, and what trains them."""

from .config import SaeConfig, SparseCoderConfig, TranscoderConfig, UsageError
from .sparse_coder import CoderOutput, EncoderOutput, Sae, SparseCoder, load_many

__all__ = [
    "CoderOutput",
    "EncoderOutput",
    "Sae",
    "SaeConfig",
    "SparseCoder",
    "SparseCoderConfig",
    "TranscoderConfig",
    "UsageError",
    "load_many",
]
