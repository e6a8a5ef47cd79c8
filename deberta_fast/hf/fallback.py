"""Settings that the patched modules of one model share, and the reasons to run Hugging Face's own forward."""

import contextlib
import warnings

import torch
from torch import nn

from ..models.ordinary import constant, is_own_code, overridden, why_not_ordinary
from ..models.packing import Packing, Unpadding, reason_to_stay
from ..op.relative_position import slot_table

# The attribute that marks a patched module; it holds what patch replaced.
MARK = "_deberta_fast"
_MODULES = ("transformers.models.deberta.modeling_deberta", "transformers.models.deberta_v2.modeling_deberta_v2")


class Shared:
    """The settings of one call of ``patch``, and the warnings that its modules have given."""

    def __init__(self, backend: str | None, unpad: bool | str, padding_rows: str):
        self.backend = backend
        self.unpadding = Unpadding(unpad, padding_rows)
        self.warned: set[str] = set()
        self.left_padding = False
        self._of_packed_sequences = Unpadding("auto", padding_rows)
        self._packed_calls = 0

    def warn(self, reason: str) -> None:
        if reason in self.warned or torch.compiler.is_compiling():
            return
        self.warned.add(reason)
        warnings.warn(f"deberta_fast: running Hugging Face's own attention: {reason}", stacklevel=3)

    def packing(self, mask: torch.Tensor | Packing | None, encoder: nn.Module) -> Packing | None:
        """The packing to run the layers of a patched encoder with."""
        if self._packed_calls:
            return self._of_packed_sequences.packing(mask, encoder)
        self.warn_of_left_padding(mask)
        return self.unpadding.packing(mask, encoder)

    @contextlib.contextmanager
    def taking_out_padding(self):
        """Inside it, padding is taken out: it is there because packed sequences were padded."""
        self._packed_calls += 1
        try:
            yield
        finally:
            self._packed_calls -= 1

    def warn_of_left_padding(self, mask: torch.Tensor | None) -> None:
        """A head that reads the first row would find nothing of the text there, and nobody would notice."""
        if self.unpadding.padding_rows == "hf" or self.left_padding or mask is None or reason_to_stay(mask) is not None:
            return
        self.left_padding = not mask[:, 0].all()
        if self.left_padding:
            warnings.warn(
                'deberta_fast: padding_rows="zeros" and the first row of a sequence is padding: heads that read it see '
                'zeros, whatever the text; padding_rows="hf" gives them what Hugging Face\'s model does',
                stacklevel=3,
            )

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
    if method := overridden(encoder, hf_class(type(encoder))):
        return f"the encoder has a {method} of its own"
    for layer in encoder.layer:
        attention = layer.attention.self
        if not hasattr(attention, MARK):
            return "a layer's attention is not a patched one"
        reason = module_reason(attention) or _passes_on(layer) or _passes_on(layer.attention)
        if reason is not None:
            return reason
    return None


def attention_reason(
    attention: nn.Module,
    output_attentions: bool,
    query_states: torch.Tensor | None,
    relative_pos: torch.Tensor | str | None,
) -> str | None:
    """The reason for which a call of a patched attention module is not fused; None if there is none."""
    if query_states is not None and is_v1(attention):
        return "query_states of DeBERTa v1 are not fused"
    if output_attentions:
        return "output_attentions=True needs the probabilities, which the fused path never holds"
    if isinstance(relative_pos, torch.Tensor):
        return "a custom relative_pos is not fused"
    return module_reason(attention)


def module_reason(attention: nn.Module) -> str | None:
    """The reason for which no call of an attention module is fused."""
    if getattr(attention, "talking_head", False):
        return "talking heads are not fused"
    if not inherits_forward(type(attention)):
        return "the attention's forward was replaced in its class"
    if method := overridden(attention, hf_class(type(attention))):
        return f"the attention has a {method} of its own"
    if reason := why_not_ordinary(attention.dropout, nn.Dropout, nn.Identity):
        return f"the attention's dropout is {reason}"
    if attention.relative_attention and not is_v1(attention):
        return _table_reason(attention.position_buckets, attention.max_relative_positions)
    return None


def _passes_on(module: nn.Module) -> str | None:
    """Whether a layer, or its attention block, hands its arguments on as Hugging Face's does: why not, or None.

    torch's wrappers do so too, those of checkpointing, compilation and sharding.
    """
    kind = type(module)
    if kind.__module__.startswith("torch."):
        return None
    place = place_of_forward(module)
    if not (inherits_forward(kind) and is_own_forward(module, vars(module).get(place))):
        return f"a {kind.__name__} has a forward of its own"
    return None


@constant
def _table_reason(position_buckets: int, max_relative_positions: int) -> str | None:
    """Hugging Face computes numbers from buckets that number no distances."""
    try:
        slot_table(position_buckets, max_relative_positions)
    except ValueError as error:
        return str(error)
    return None


def is_v1(attention: nn.Module) -> bool:
    """Whether an attention module is v1's: the classes of v1 and v2 have one name."""
    return hasattr(attention, "in_proj")


@constant
def hf_class(kind: type) -> type | None:
    """The class of Hugging Face's DeBERTa that ``kind`` is or comes from; None if there is none."""
    return next((base for base in kind.__mro__ if base.__module__ in _MODULES), None)


def inherits_forward(kind: type) -> bool:
    """Whether a class computes what its class of Hugging Face's computes."""
    own = hf_class(kind)
    return own is not None and is_own_code(own.forward, own) and _inherits(kind, own)


@constant
def _inherits(kind: type, own: type) -> bool:
    forward = kind.forward
    # transformers wraps the forward of every subclass of a layer anew, with the code that wraps its own
    while forward is not own.forward and getattr(forward, "__code__", None) is own.forward.__code__:
        forward = getattr(forward, "__wrapped__", None)
    return forward is own.forward


def place_of_forward(module: nn.Module) -> str:
    """The attribute to replace: accelerate's hooks move the original forward to ``_old_forward``."""
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"


def is_own_forward(module: nn.Module, forward) -> bool:
    """Whether an instance's forward is its class's, also where a hook that came and went has left it there."""
    return forward is None or getattr(forward, "__func__", None) is type(module).forward
