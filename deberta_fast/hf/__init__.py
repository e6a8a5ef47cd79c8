"""The drop-in for Hugging Face DeBERTa v1, v2 and v3: ``patch`` and ``unpatch``."""

from .patch import patch, unpatch

__all__ = ["patch", "unpatch"]
