"""Settings that the patched modules of one model share, and reasons to run Hugging Face's own forward."""

import contextlib
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..models.ordinary import constant, is_own_code, overridden, why_not_ordinary
from ..models.packing import Packing, Unpadding, reason_to_stay
from ..op.relative_position import slot_table

if TYPE_CHECKING:  # few processes need torch.distributed's parts, which it imports
    from ..models.sharding import ContextParallel, Sharding

# The attribute that marks a patched module; it holds what patch replaced.
MARK = "_deberta_fast"
_MODULES = ("transformers.models.deberta.modeling_deberta", "transformers.models.deberta_v2.modeling_deberta_v2")


class Shared:
    """The settings of one call of ``patch``, and which warnings its modules have given."""

    def __init__(self, backend: str | None, unpad: bool | str, padding_rows: str):
        self.backend = backend
        self.unpadding = Unpadding(unpad, padding_rows)
        # The processes that share sequences, the forward pass that is under way, and hooks that serve it.
        self.context: ContextParallel | None = None
        self.sharding: Sharding | None = None
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.warned: set[str] = set()
        self._warned_of_left_padding = False
        self._packed_unpadding = Unpadding("auto", padding_rows)
        self._packed_calls = 0

    def warn(self, reason: str, once: bool = False) -> None:
        """Warns of a fallback once per reason; with ``once``, only if this is the first warning for any reason."""
        if reason in self.warned or (once and self.warned) or torch.compiler.is_compiling():
            return
        self.warned.add(reason)
        warnings.warn(f"deberta_fast: running Hugging Face's own attention: {reason}", stacklevel=3)

    def fall_back(self, reason: str, once: bool = False) -> None:
        """Warns, as ``warn``, of a fallback.

        Raises:
            RuntimeError: processes share sequences. Hugging Face's own attention would see one stretch of them only.
        """
        if self.context is not None:
            raise RuntimeError(f"processes share sequences, and this call is not fused: {reason}")
        self.warn(reason, once)

    def sequences(self) -> "Sharding | None":
        """Returns what layers take in place of a mask if processes share sequences, else None.

        Raises:
            RuntimeError: they do, and no patched model's forward has prepared it.
        """
        if self.context is not None and self.sharding is None:
            raise RuntimeError("processes share sequences: call the patched model's forward, not its encoder's")
        return self.sharding

    @contextlib.contextmanager
    def sharing(self, sharding: "Sharding"):
        """A context in which encoders run on stretches of sequences."""
        self.sharding = sharding
        try:
            yield
        finally:
            self.sharding = None

    def packing(self, mask: torch.Tensor | Packing | None, encoder: nn.Module) -> Packing | None:
        """The packing that removes the padding before the layers of a patched encoder; None keeps the batch."""
        if self._packed_calls:
            return self._packed_unpadding.packing(mask, encoder)
        self._warn_of_left_padding(mask)
        return self.unpadding.packing(mask, encoder)

    @contextlib.contextmanager
    def removing_padding(self):
        """A context in which batches were padded from packed sequences, so encoders remove the padding even if
        ``unpad`` is False."""
        self._packed_calls += 1
        try:
            yield
        finally:
            self._packed_calls -= 1

    def _warn_of_left_padding(self, mask: torch.Tensor | None) -> None:
        """Warns once if heads that read the first row get zeros, because it is padding and padding_rows is "zeros"."""
        done = self._warned_of_left_padding or self.unpadding.padding_rows == "hf"
        if done or mask is None or reason_to_stay(mask) is not None or mask[:, 0].all():
            return
        self._warned_of_left_padding = True
        warnings.warn(
            'deberta_fast: padding_rows="zeros" and the first row of a sequence is padding: heads that read it see '
            'zeros, whatever the text; padding_rows="hf" gives them what Hugging Face\'s model does',
            stacklevel=3,
        )


def encoder_reason(
    encoder: nn.Module, output_attentions: bool, query_states: torch.Tensor | None, relative_pos: torch.Tensor | None
) -> str | None:
    """The reason why a call of a patched encoder is not fused, or None."""
    if reason := _call_reason(output_attentions, relative_pos):
        return reason
    if query_states is not None:
        return "query_states handed to the encoder are not fused"
    if method := overridden(encoder, hf_class(type(encoder))):
        return f"the encoder has a {method} of its own"
    for layer in encoder.layer:
        attention = layer.attention.self
        if not hasattr(attention, MARK):
            return "a layer's attention is not a patched one"
        if reason := module_reason(attention) or _forward_reason(layer) or _forward_reason(layer.attention):
            return reason
    return None


def attention_reason(
    attention: nn.Module,
    output_attentions: bool,
    query_states: torch.Tensor | None,
    relative_pos: torch.Tensor | str | None,
) -> str | None:
    """The reason why a call of a patched attention module is not fused, or None."""
    if query_states is not None and is_v1(attention):
        return "query_states of DeBERTa v1 are not fused"
    return _call_reason(output_attentions, relative_pos) or module_reason(attention)


def _call_reason(output_attentions: bool, relative_pos: torch.Tensor | str | None) -> str | None:
    if output_attentions:
        return "output_attentions=True needs the probabilities, which the fused path never holds"
    return None if relative_pos is None or isinstance(relative_pos, str) else "a custom relative_pos is not fused"


def module_reason(attention: nn.Module) -> str | None:
    """The reason why no call of an attention module is fused, or None."""
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


def _forward_reason(module: nn.Module) -> str | None:
    """The reason why a layer or its attention block may not pass on its arguments as Hugging Face's does, or None.

    torch's wrappers for checkpointing, compilation and sharding pass them on.
    """
    kind = type(module)
    of_torch = (getattr(kind.forward, "__module__", None) or "").startswith("torch.")
    if of_torch or (inherits_forward(kind) and runs_class_forward(module)):
        return None
    return f"a {kind.__name__} has a forward of its own"


@constant
def _table_reason(position_buckets: int, max_relative_positions: int) -> str | None:
    """The reason why ``slot_table`` refuses these bucket sizes, which Hugging Face accepts, or None."""
    try:
        slot_table(position_buckets, max_relative_positions)
    except ValueError as error:
        return str(error)
    return None


def is_v1(attention: nn.Module) -> bool:
    """Whether an attention module is v1's; the classes of v1 and v2 have the same name."""
    return hasattr(attention, "in_proj")


@constant
def hf_class(kind: type) -> type | None:
    """The class of Hugging Face's DeBERTa that ``kind`` is or inherits from, or None."""
    return next((base for base in kind.__mro__ if base.__module__ in _MODULES), None)


def inherits_forward(kind: type) -> bool:
    """Whether a class has the unchanged ``forward`` of its Hugging Face class."""
    own = hf_class(kind)
    return own is not None and is_own_code(own.forward, own) and _inherits(kind, own)


@constant
def _inherits(kind: type, own: type) -> bool:
    forward = kind.forward
    # transformers' GradientCheckpointingLayer wraps the forward of each subclass again, even an inherited one. All its
    # wrappers have the same code.
    while forward is not own.forward and getattr(forward, "__code__", None) is own.forward.__code__:
        forward = getattr(forward, "__wrapped__", None)
    return forward is own.forward


def forward_attribute(module: nn.Module) -> str:
    """The attribute that holds the original forward, which accelerate's hooks move to ``_old_forward``."""
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"


def instance_forward(module: nn.Module):
    """The forward set on the instance, or None."""
    return vars(module).get(forward_attribute(module))


def runs_class_forward(module: nn.Module) -> bool:
    """Whether a module runs its class's forward. A removed hook may have left that method on the instance."""
    forward = instance_forward(module)
    return forward is None or getattr(forward, "__func__", None) is type(module).forward
