"""Disentangled attention as an operator: public functions, torch's view of them, and the backends. Knows no model."""

from . import backends
from .api import disentangled_attention, disentangled_attention_varlen
from .backends.cpu import release_memory
from .selection import set_backend_check

__all__ = [
    "backends",
    "disentangled_attention",
    "disentangled_attention_varlen",
    "release_memory",
    "set_backend_check",
]
