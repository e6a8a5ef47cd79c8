"""Fast disentangled attention for DeBERTa v1, v2 and v3."""

from . import backends
from .functional import disentangled_attention, disentangled_attention_varlen
from .hf import patch, unpatch

__version__ = "0.1.0"
__all__ = ["backends", "disentangled_attention", "disentangled_attention_varlen", "patch", "unpatch"]
