"""Settings that the patched modules of one model share, and the reasons to run Hugging Face's own forward."""

import warnings

import torch
from torch import nn

from ..models.packing import Unpadding

# The attribute that marks a patched module; it holds what patch replaced.
MARK = "_deberta_fast"


class Shared:
    """The settings of one call of ``patch``, and the warnings that its modules have given."""

    def __init__(self, backend: str | None, unpad: bool | str):
        self.backend = backend
        self.unpadding = Unpadding(unpad)
        self.warned: set[str] = set()

    def warn(self, reason: str) -> None:
        if reason in self.warned or torch.compiler.is_compiling():
            return
        self.warned.add(reason)
        warnings.warn(f"deberta_fast: running Hugging Face's own attention: {reason}", stacklevel=3)

    def warn_unless_warned(self, reason: str) -> None:
        """For an attention module: the encoder above it may have warned of its own fallback already."""
        if not self.warned:
            self.warn(reason)


def encoder_reason(
    encoder: nn.Module, output_attentions: bool, query_states: torch.Tensor | None, relative_pos: torch.Tensor | None
) -> str | None:
    """The reason for which a call of a patched encoder is not fused; None if there is none."""
    if output_attentions:
        return "output_attentions=True needs the probabilities, which the fused path never holds"
    if relative_pos is not None:
        return "a custom relative_pos is not fused"
    if query_states is not None:
        return "query_states handed to the encoder are not fused"
    if any(getattr(layer.attention.self, "talking_head", False) for layer in encoder.layer):
        return "talking heads are not fused"
    if not all(hasattr(layer.attention.self, MARK) for layer in encoder.layer):
        return "a layer's attention is not a patched one"
    return None


def attention_reason(
    attention: nn.Module,
    output_attentions: bool,
    query_states: torch.Tensor | None,
    relative_pos: torch.Tensor | str | None,
) -> str | None:
    """The reason for which a call of a patched attention module is not fused; None if there is none."""
    if getattr(attention, "talking_head", False):
        return "talking heads are not fused"
    if query_states is not None and is_v1(attention):
        return "query_states of DeBERTa v1 are not fused"
    if output_attentions:
        return "output_attentions=True needs the probabilities, which the fused path never holds"
    if isinstance(relative_pos, torch.Tensor):
        return "a custom relative_pos is not fused"
    if not isinstance(attention.dropout, nn.Dropout | nn.Identity):
        return f"the attention's dropout is a {type(attention.dropout).__name__}, not torch's"
    return None


def is_v1(attention: nn.Module) -> bool:
    """Whether an attention module is v1's: the classes of v1 and v2 have one name."""
    return hasattr(attention, "in_proj")
