"""Reads and writes checkpoints, and translates the names that Hugging Face, Microsoft and Keras give to tensors."""

from .error import CheckpointError
from .files import read_tensors, write_tensors
from .load import LoadingInfo, check_layers, fill, without_memory
from .names import to_hf, to_native

__all__ = [
    "CheckpointError",
    "LoadingInfo",
    "check_layers",
    "fill",
    "read_tensors",
    "to_hf",
    "to_native",
    "without_memory",
    "write_tensors",
]
