"""Sparse autoencoders and transcoders: the coders, and what trains them."""

from .coders.outputs import CoderOutput, EncoderOutput
from .coders.sparse_coder import SparseCoder
from .config import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    RunConfig,
    SaeConfig,
    SparseCoderConfig,
    TrainingConfig,
    TranscoderConfig,
)
from .flag_checks import UsageError

Sae, load_many = SparseCoder, SparseCoder.load_many

__all__ = [
    "CoderOutput",
    "DataConfig",
    "EncoderOutput",
    "MachineConfig",
    "ModelConfig",
    "RunConfig",
    "Sae",
    "SaeConfig",
    "SparseCoder",
    "SparseCoderConfig",
    "TrainingConfig",
    "TranscoderConfig",
    "UsageError",
    "load_many",
]
