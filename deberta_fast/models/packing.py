"""Batches without their padding: the tokens of all sequences one after the other.

What works token by token (linear layers, norms, activations) takes packed states (T, hidden_size) as it takes any;
attention needs to know where sequences end, and a convolution must not reach from one into the next.
"""

import warnings
from typing import NamedTuple

import torch

from ..op.call import check_cu_seqlens_form, integer
from ..op.schema import checked_cu_seqlens
from .padding import PackedPadding, check_padding_rows, is_traced

UNPAD = (False, "auto", True)
# "auto" takes padding out from this share of a batch's rows on: less costs as much as it saves (docs/measured.md).
WORTH = 1 / 32


class Packing(NamedTuple):
    """Where the sequences of packed states (T, ...) lie. Attention takes it in the place of a mask.

    Whoever makes one answers for its cu_seqlens: attention does not check their values.

    Attributes:
        cu_seqlens: int32 (n + 1,), sequence s at rows cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: at least the longest sequence's length.
        mask: bool (T,), False for tokens that nobody attends to; None where there are none.
        rows: int64 (T,), for each token its row in the padded batch (B L, ...); None where there is no such batch.
        padding: where rows of padding get Hugging Face's values; then the last row of a sequence may stand for padding.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    mask: torch.Tensor | None
    rows: torch.Tensor | None = None
    padding: PackedPadding | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """Sequence lengths, (n,)."""
        return self.cu_seqlens.diff()

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) to (T, ...)."""
        return states.flatten(0, 1).index_select(0, self.rows)

    def pad(self, states: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """(T, ...) to (B, L, ...); zeros where there is no token, unless ``padding`` knows better."""
        if self.padding is not None:
            return self.padding.pad(states, batch)
        return _scattered(states, self.rows, batch * length).unflatten(0, (batch, length))

    def positions(self, tokens: int) -> torch.Tensor:
        """Each token's place in its own sequence, int64 (T,)."""
        return torch.arange(tokens, device=self.cu_seqlens.device) - self._by_token(self.cu_seqlens[:-1], tokens)

    def by_sequence(self, values: torch.Tensor, fill: float | bool) -> torch.Tensor:
        """(T, ...) to (n, max_seqlen, ...), ``fill`` behind each sequence's end."""
        sequences = self.cu_seqlens.shape[0] - 1
        filled = values.new_full((sequences * self.max_seqlen, *values.shape[1:]), fill)
        return filled.index_copy(0, self._padded_rows(values.shape[0]), values).unflatten(0, (sequences, -1))

    def by_token(self, values: torch.Tensor, tokens: int) -> torch.Tensor:
        """(n, max_seqlen, ...) to (T, ...), the inverse of ``by_sequence``."""
        return values.flatten(0, 1).index_select(0, self._padded_rows(tokens))

    def _padded_rows(self, tokens: int) -> torch.Tensor:
        sequences = torch.arange(self.cu_seqlens.shape[0] - 1, device=self.cu_seqlens.device)
        return self._by_token(sequences, tokens) * self.max_seqlen + self.positions(tokens)

    def check_choices(self, choices: int | None) -> None:
        """Checks that multiple choice with so many choices per question divides the sequences into questions."""
        sequences = self.cu_seqlens.shape[0] - 1
        if not isinstance(choices, int) or choices < 1 or sequences % choices:
            raise ValueError(f"choices must divide the number of sequences, {sequences}, got {choices}")

    def convolve(self, layer: torch.nn.Module, embeddings: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """A convolution layer (``encoder.ConvLayer`` or Hugging Face's) of packed states, each sequence for itself.

        Sequences are set as far apart as the kernel reaches beyond its middle, with zeros between: one batch row.

        Args:
            embeddings, output: what the layer convolves and what it adds that to, (T, hidden_size).
        """
        tokens, sequences = embeddings.shape[0], self.cu_seqlens.shape[0] - 1
        gap = layer.conv.weight.shape[-1] // 2
        shifts = gap * torch.arange(sequences, device=embeddings.device)
        rows = torch.arange(tokens, device=embeddings.device) + self._by_token(shifts, tokens)
        seen = rows.new_ones(tokens) if self.mask is None else self.mask.long()
        apart = (_scattered(x, rows, tokens + gap * sequences).unsqueeze(0) for x in (embeddings, output, seen))
        return layer(*apart).squeeze(0).index_select(0, rows)

    def first_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Each sequence's first token, (T, ...) to (n, ...); zeros for an empty sequence."""
        starts = self.cu_seqlens[:-1].long().clamp(max=states.shape[0] - 1)
        empty = (self.lengths == 0).reshape(-1, *(1,) * (states.dim() - 1))
        return states.index_select(0, starts).masked_fill(empty, 0)

    def _by_token(self, values: torch.Tensor, tokens: int) -> torch.Tensor:
        """One value per sequence, (n,), repeated for each of its tokens, (T,)."""
        return values.repeat_interleave(self.lengths, output_size=tokens)


def check_unpad(unpad: bool | str) -> bool | str:
    if not any(unpad is value or (value == "auto" == unpad) for value in UNPAD):
        raise ValueError(f'unpad must be False, "auto" or True, got {unpad!r}')
    return unpad


class Unpadding:
    """Decides for every batch whether its padding is taken out.

    Attributes:
        mode: False, never; "auto", where it pays; True, wherever there is padding, with one warning where it stays.
        padding_rows: "hf", rows of padding get Hugging Face's values; "zeros", they come out as zeros.
    """

    def __init__(self, mode: bool | str, padding_rows: str = "hf"):
        self.mode, self.padding_rows = check_unpad(mode), check_padding_rows(padding_rows)
        self._warned = False

    def packing(
        self, mask: torch.Tensor | Packing | None, encoder: torch.nn.Module, dense: str | None = None
    ) -> Packing | None:
        """The packing to run the layers with, or None to run them on the batch as it is.

        Args:
            mask: bool; a ``Packing`` where states are packed already.
            encoder: what runs the layers.
            dense: why attention needs the batch as it is, to make its probabilities; None if it does not.
        """
        if not self.mode or mask is None or isinstance(mask, Packing):
            return None
        reason = f"{dense}: computed densely" if dense else reason_to_stay(mask) or reason_of_adapters(encoder)
        if reason is None:
            return packing_of(mask, self.mode, self.padding_rows)
        if self.mode is True and not (self._warned or torch.compiler.is_compiling()):
            self._warned = True
            warnings.warn(f"deberta_fast: padding stays, in spite of unpad=True: {reason}", stacklevel=2)
        return None

    def padded(
        self, states: list[torch.Tensor], packing: Packing | None, mask: torch.Tensor | Packing | None, shape: tuple
    ) -> list[torch.Tensor]:
        """What the layers gave, (B, L, hidden_size), where ``shape`` is (B, L) and ``mask`` what they were given."""
        if packing is not None:
            states = [packing.pad(x, *shape) for x in states]
        if self.padding_rows == "hf" or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return states
        return [x.masked_fill(~mask.unsqueeze(-1), 0) for x in states]


def reason_of_adapters(encoder: torch.nn.Module) -> str | None:
    """PEFT's ``adapter_names`` give each row of a batch an adapter, by hooks on the layers for one call: then those
    have to see rows."""
    for module in encoder.modules():
        for hook in module._forward_pre_hooks.values():
            if "adapter_names" in (getattr(hook, "keywords", None) or ()):
                return "adapter_names of every row of the batch"
    return None


def packing_of(token_mask: torch.Tensor, unpad: bool | str, padding_rows: str) -> Packing | None:
    """The packing of a padded batch. Each row is kept from its first token to its last; padding between them is masked.

    Synchronises with the device once, to learn how many tokens there are.

    Args:
        token_mask: bool (B, L), False for padding.
        unpad: True, or "auto" to leave little padding in.
        padding_rows: with "hf", a row of padding goes along with every sequence that has some outside of its tokens.

    Returns:
        None where there is no padding to take out, or no token at all.
    """
    batch, length = token_mask.shape
    places = torch.arange(length, device=token_mask.device)
    first = torch.where(token_mask, places, length).amin(1)
    spans = (torch.where(token_mask, places, -1).amax(1) + 1 - first).clamp(min=0)
    kept = spans + (spans < length) if padding_rows == "hf" else spans
    lengths, tokens = torch.stack([kept, token_mask.sum(1)]).tolist()
    total = sum(lengths)
    if not any(tokens) or batch * length - total <= (0 if unpad is True else WORTH * batch * length):
        return None
    ends = kept.cumsum(0)
    by_token = lambda values: values.repeat_interleave(kept, output_size=total)
    sequences = by_token(torch.arange(batch, device=token_mask.device))
    places = torch.arange(total, device=token_mask.device) - by_token(ends - kept)
    outside = places == by_token(spans)  # the rows that stand for padding
    first_outside = torch.where(first > 0, 0, spans)
    rows = sequences * length + torch.where(outside, by_token(first_outside), places + by_token(first))
    mask, padding = token_mask.flatten().index_select(0, rows), None
    if padding_rows == "hf":
        at = torch.nonzero_static(~mask, size=total - sum(tokens)).squeeze(1)
        source = (ends - 1).repeat_interleave(length, output_size=batch * length)
        source = source.index_copy(0, rows, torch.arange(total, device=rows.device))
        weights = torch.where(outside, by_token(length - spans), 1)
        padding = PackedPadding(at, sequences, ends - kept, weights, length, source)
    return Packing(
        cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).int(),
        max_seqlen=max(lengths),
        mask=None if sum(tokens) == total else mask,
        rows=rows,
        padding=padding,
    )


def packed_sequences(
    cu_seqlens: torch.Tensor, max_seqlen: int | None, attention_mask: torch.Tensor | None, states: torch.Tensor
) -> Packing:
    """The packing of sequences that the caller has packed. This is the one place that checks them.

    Args:
        cu_seqlens, max_seqlen, attention_mask: as of ``DebertaModel.forward_packed``.
        states: (T, ...).

    Raises:
        TypeError, ValueError: an argument is not as described. Where cu_seqlens lie on a device and max_seqlen is
            given, nobody waits for their values: a device-side assertion checks them.
    """
    tokens = states.shape[0]
    check_cu_seqlens_form(cu_seqlens, states.device)
    if attention_mask is not None and attention_mask.shape != (tokens,):
        raise ValueError(f"attention_mask must be of shape {(tokens,)}, got {tuple(attention_mask.shape)}")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if max_seqlen is None and traced:
        raise ValueError("max_seqlen must be given where forward_packed is compiled or exported")
    if not (max_seqlen is None or traced):
        max_seqlen = integer("max_seqlen", max_seqlen)
    if not traced and (max_seqlen is None or cu_seqlens.device.type == "cpu"):
        ends = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
        longest = max(lengths, default=0) if max_seqlen is None else max_seqlen
        if ends[0] != 0 or ends[-1] != tokens or min(lengths) < 0 or max(lengths) > longest:
            expected = f"rise from 0 to {tokens} in steps of 0 to max_seqlen={longest}"
            raise ValueError(f"cu_seqlens must {expected}, got {ends}")
        max_seqlen, cu_seqlens = longest, cu_seqlens.clone()  # backward reads it again
    else:
        cu_seqlens = checked_cu_seqlens(cu_seqlens, tokens, max_seqlen)
    return Packing(cu_seqlens, max_seqlen, None if attention_mask is None else attention_mask.bool())


def reason_to_stay(mask: torch.Tensor) -> str | None:
    """The reason for which a batch with this mask, bool, keeps its padding; None if there is none."""
    if is_traced():
        return "a traced program cannot depend on how many tokens there are"
    if torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return "what torch.func transforms cannot depend on how many tokens there are"
    if mask.dim() != 2:
        return "a mask of pairs of tokens"
    if type(mask) is not torch.Tensor or mask.is_meta:
        return f"a mask without data, a {type(mask).__name__} on {mask.device}"
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a captured program cannot depend on how many tokens there are"
    return None


def _scattered(states: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    return states.new_zeros(total, *states.shape[1:]).index_copy(0, rows, states)
