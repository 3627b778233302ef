"""Sparse autoencoders and transcoders: the coders, and what trains them."""

from .coders.outputs import CoderOutput, EncoderOutput
from .coders.sparse_coder import Sae, SparseCoder, load_many
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
