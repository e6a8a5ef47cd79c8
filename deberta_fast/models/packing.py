"""Packed batches: the tokens of all sequences one after the other, without padding.

Token-wise operations (linear layers, norms, activations) run on packed states (T, hidden_size) unchanged. Attention
needs the sequences' boundaries, and a convolution must not reach from one sequence into the next.
"""

import warnings
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch

from ..op.api import disentangled_attention_varlen
from ..op.call import check_cu_seqlens_form, check_cu_seqlens_values, integer
from ..op.dropout import new_seed_of_heads
from ..op.schema import checked_cu_seqlens
from .losses import span_loss, token_loss
from .padding import PackedPadding, is_traced

# "auto" removes padding if it is more than this share of a batch's rows. Removing less saves no time
# (docs/measured.md).
WORTH = 1 / 32


class Sequences(Protocol):
    """Stands in place of a mask in layers and heads: packed sequences, or stretches of them (``sharding.Sharding``)."""

    @property
    def cu_seqlens(self) -> Any:
        """Int32 (n + 1,), the ends of packed sequences."""

    @property
    def max_seqlen(self) -> int:
        """At least the length of the longest sequence."""

    @property
    def tokens(self) -> torch.Tensor | None:
        """Which of the rows that are here are attended to, bool; None if all are."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: tuple[int, int] | None, **arguments
    ) -> torch.Tensor:
        """Attention of heads (..., H, D), returning (..., H D); ``share`` is that of ``attention.head_share``."""

    def with_means(self, context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Gives rows of ``context`` that stand for padding their values, the mean of V (``padding``)."""

    def convolve(
        self, layer: torch.nn.Module, embeddings: torch.Tensor, output: torch.Tensor, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Applies a convolution layer (``encoder.ConvLayer`` or Hugging Face's) to each sequence separately.

        ``embeddings`` and ``output`` are the layer's input and residual.
        """

    def positions(self, tokens: int) -> torch.Tensor:
        """Each row's place in its own sequence, int64 (tokens,)."""

    def first_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Each sequence's first token, (n, width)."""

    def repeated(self, values: torch.Tensor, tokens: int) -> torch.Tensor:
        """One value per sequence, (n, width), for each row that is here: as the states, or broadcastable to them."""

    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``losses.token_loss`` over all sequences."""

    def span_loss(
        self, start_logits: torch.Tensor, end_logits: torch.Tensor, start: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """``losses.span_loss`` of all sequences; logits as the states."""


class Packing(NamedTuple):
    """The sequences of packed states (T, ...). Attention takes it in place of a mask.

    Attention does not check the values of cu_seqlens: ``packed_sequences`` and ``packing_of`` make valid ones.

    Attributes:
        cu_seqlens: int32 (n + 1,); sequence s lies at rows cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: at least the longest sequence's length.
        mask: bool (T,), False for tokens that are not attended to; None if there are none.
        rows: int64 (T,), the row of each token in the padded batch (B L, ...); None without such a batch.
        padding: the rows that stand for padding and get Hugging Face's values, among them the last row of a sequence
            that has padding around its tokens; None if rows of padding are zero, or without a padded batch.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    mask: torch.Tensor | None
    rows: torch.Tensor | None = None
    padding: PackedPadding | None = None

    @property
    def tokens(self) -> torch.Tensor | None:
        return self.mask

    @property
    def lengths(self) -> torch.Tensor:
        """Sequence lengths, (n,)."""
        return self.cu_seqlens.diff()

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: tuple[int, int] | None, **arguments
    ) -> torch.Tensor:
        """``disentangled_attention_varlen`` of heads (T, H, D), returning (T, H D)."""
        # The values of cu_seqlens were checked when the packing was made; checking again would launch more kernels.
        output = disentangled_attention_varlen(
            query, key, value, cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen, attention_mask=self.mask,
            check_values=False, dropout_seed=new_seed_of_heads(query.device, share), **arguments,
        )  # fmt: skip
        return output.flatten(1)

    def with_means(self, context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Replaces rows of padding in ``context`` (T, H D), if there are any, by the mean of V (T, H, D)."""
        return context if self.padding is None else self.padding.with_means(context, value)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) to (T, ...)."""
        return states.flatten(0, 1).index_select(0, self.rows)  # type: ignore[arg-type]

    def pad(self, states: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """(T, ...) to (B, L, ...). Rows of padding come from ``padding``, or are zero without it."""
        if self.padding is not None:
            return self.padding.pad(states, batch)
        rows: Any = self.rows  # None only for sequences that the caller packed
        return _scattered(states, rows, batch * length).unflatten(0, (batch, length))

    def positions(self, tokens: int) -> torch.Tensor:
        """Each token's place in its own sequence, int64 (T,)."""
        return torch.arange(tokens, device=self.cu_seqlens.device) - self.repeated(self.cu_seqlens[:-1], tokens)

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
        return self.repeated(sequences, tokens) * self.max_seqlen + self.positions(tokens)

    def convolve(
        self, layer: torch.nn.Module, embeddings: torch.Tensor, output: torch.Tensor, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Applies a convolution layer (``encoder.ConvLayer`` or Hugging Face's) to each packed sequence separately.

        The sequences become one row of a batch. Half a kernel of zeros follows each, so that no product of the
        convolution reaches the next sequence. ``embeddings`` and ``output`` are the layer's input and residual, (T,
        hidden_size). ``token_mask`` is that of a padded batch, and unused.
        """
        tokens, sequences = embeddings.shape[0], self.cu_seqlens.shape[0] - 1
        weight: Any = layer.conv.weight  # type: ignore[union-attr]
        gap = weight.shape[-1] // 2
        shifts = gap * torch.arange(sequences, device=embeddings.device)
        rows = torch.arange(tokens, device=embeddings.device) + self.repeated(shifts, tokens)
        seen = rows.new_ones(tokens) if self.mask is None else self.mask.long()
        apart = (_scattered(x, rows, tokens + gap * sequences).unsqueeze(0) for x in (embeddings, output, seen))
        return layer(*apart).squeeze(0).index_select(0, rows)

    def first_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Each sequence's first token, (T, ...) to (n, ...); zeros for an empty sequence."""
        starts = self.cu_seqlens[:-1].long().clamp(max=states.shape[0] - 1)
        empty = (self.lengths == 0).reshape(-1, *(1,) * (states.dim() - 1))
        return states.index_select(0, starts).masked_fill(empty, 0)

    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return token_loss(logits, labels)

    def span_loss(
        self, start_logits: torch.Tensor, end_logits: torch.Tensor, start: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        tokens = torch.ones_like(start_logits, dtype=torch.bool) if self.mask is None else self.mask
        start_logits, end_logits = self.by_sequence(start_logits, 0.0), self.by_sequence(end_logits, 0.0)
        return span_loss(start_logits, end_logits, start, end, self.by_sequence(tokens, False))

    def repeated(self, values: torch.Tensor, tokens: int) -> torch.Tensor:
        """Repeats one value per sequence, (n, ...), for each token of the sequence, (T, ...)."""
        return values.repeat_interleave(self.lengths, dim=0, output_size=tokens)


def check_choices(sequences: Sequences, choices: int | None) -> None:
    """Raises ValueError unless the number of sequences is a multiple of ``choices``, the answers per question."""
    count = sequences.cu_seqlens.shape[0] - 1
    if not isinstance(choices, int) or choices < 1 or count % choices:
        raise ValueError(f"choices must divide the number of sequences, {count}, got {choices}")


def is_sequences(mask: torch.Tensor | Sequences | None) -> TypeGuard[Sequences]:
    """Whether layers get ``Sequences`` and no mask of a batch."""
    return not (mask is None or isinstance(mask, torch.Tensor)) and hasattr(mask, "attend")


class Unpadding:
    """Decides for every batch whether its padding is removed.

    Attributes:
        mode: False never removes padding, "auto" only where that takes less time, True wherever there is padding. True
            warns once if padding has to stay.
        padding_rows: "hf" gives rows of padding Hugging Face's values, "zeros" zeros.
    """

    def __init__(self, mode: bool | str, padding_rows: str = "hf"):
        if not (mode is False or mode is True or mode == "auto"):
            raise ValueError(f'unpad must be False, "auto" or True, got {mode!r}')
        if padding_rows not in ("hf", "zeros"):
            raise ValueError(f'padding_rows must be "hf" or "zeros", got {padding_rows!r}')
        self.mode, self.padding_rows = mode, padding_rows
        self._warned = False

    def packing(
        self, mask: torch.Tensor | Sequences | None, encoder: torch.nn.Module, dense: str | None = None
    ) -> Packing | None:
        """The packing that removes the padding before the layers of ``encoder``; None leaves their input unchanged.

        ``dense`` is the reason why attention materialises its probabilities, which needs the padded batch; or None.
        """
        if not self.mode or not isinstance(mask, torch.Tensor):
            return None
        reason = f"{dense}: computed densely" if dense else reason_to_stay(mask) or reason_of_adapters(encoder)
        if reason is None:
            return packing_of(mask, self.mode, self.padding_rows)
        if self.mode is True and not (self._warned or torch.compiler.is_compiling()):
            self._warned = True
            warnings.warn(f"deberta_fast: padding stays, in spite of unpad=True: {reason}", stacklevel=2)
        return None

    def padded(
        self, states: list[torch.Tensor], packing: Packing | None, mask: torch.Tensor | Sequences | None, shape: tuple
    ) -> list[torch.Tensor]:
        """Undoes ``packing`` for the layers' outputs, and applies ``padding_rows`` to batches.

        ``shape`` is (B, L) of the padded batch, ``mask`` the encoder's argument.
        """
        if packing is not None:
            states = [packing.pad(x, *shape) for x in states]
        if self.padding_rows == "hf" or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return states
        return [x.masked_fill(~mask.unsqueeze(-1), 0) for x in states]


def reason_of_adapters(encoder: torch.nn.Module) -> str | None:
    """The reason why the layers need the batch's rows, or None. PEFT's ``adapter_names`` choose an adapter per row."""
    for module in encoder.modules():
        for hook in module._forward_pre_hooks.values():
            if "adapter_names" in (getattr(hook, "keywords", None) or ()):
                return "adapter_names choose an adapter for every row of the batch"
    return None


def packing_of(token_mask: torch.Tensor, unpad: bool | str, padding_rows: str) -> Packing | None:
    """The packing of a batch with token_mask, bool (B, L); None if there is no token, or no padding to remove.

    Each row is kept from its first token to its last, and padding between these is masked. With padding_rows "hf", one
    row of padding follows each sequence that has padding before its first or after its last token. Synchronises with
    the device once.
    """
    batch, length = token_mask.shape
    positions = torch.arange(length, device=token_mask.device)
    first = torch.where(token_mask, positions, length).amin(1)
    spans = (torch.where(token_mask, positions, -1).amax(1) + 1 - first).clamp(min=0)
    lengths = spans + (spans < length) if padding_rows == "hf" else spans
    counts, tokens = torch.stack([lengths, token_mask.sum(1)]).tolist()
    total = sum(counts)
    if not any(tokens) or batch * length - total <= (0 if unpad is True else WORTH * batch * length):
        return None
    ends = lengths.cumsum(0)
    starts = ends - lengths
    repeated = lambda values: values.repeat_interleave(lengths, output_size=total)
    sequences = repeated(torch.arange(batch, device=token_mask.device))
    positions = torch.arange(total, device=token_mask.device) - repeated(starts)
    outside = positions == repeated(spans)  # the rows that stand for padding
    first_outside = torch.where(first > 0, 0, spans)
    rows = sequences * length + torch.where(outside, repeated(first_outside), positions + repeated(first))
    mask, padding = token_mask.flatten().index_select(0, rows), None
    if padding_rows == "hf":
        padded = torch.nonzero_static(~mask, size=total - sum(tokens)).squeeze(1)
        source = (ends - 1).repeat_interleave(length, output_size=batch * length)
        source = source.index_copy(0, rows, torch.arange(total, device=rows.device))
        weights = torch.where(outside, repeated(length - spans), 1)
        padding = PackedPadding(padded, sequences, starts, weights, length, source)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()
    return Packing(cu_seqlens, max(counts), None if sum(tokens) == total else mask, rows, padding)


def packed_sequences(
    cu_seqlens: torch.Tensor, max_seqlen: int | None, attention_mask: torch.Tensor | None, states: torch.Tensor
) -> Packing:
    """Checks the caller's packed sequences, states (T, ...), and returns their packing.

    Raises:
        TypeError, ValueError: an argument is not as ``DebertaModel.forward`` describes it. If cu_seqlens is on a GPU
            and max_seqlen is given, an assertion on the device checks the values, which does not synchronise.
    """
    tokens = states.shape[0]
    check_cu_seqlens_form(cu_seqlens, states.device)
    if attention_mask is not None and attention_mask.shape != (tokens,):
        raise ValueError(f"attention_mask must be of shape {(tokens,)}, got {tuple(attention_mask.shape)}")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if max_seqlen is None and traced:
        raise ValueError("max_seqlen must be given where forward_packed is compiled or exported")
    if max_seqlen is None:
        ends = cu_seqlens.cpu()
        max_seqlen = max(ends.long().diff().tolist(), default=0)
        check_cu_seqlens_values(ends, tokens, max_seqlen)
        cu_seqlens = cu_seqlens.clone()  # backward reads it, and the caller may have changed it by then
    else:
        max_seqlen = max_seqlen if traced else integer("max_seqlen", max_seqlen)
        cu_seqlens = checked_cu_seqlens(cu_seqlens, tokens, max_seqlen)
    return Packing(cu_seqlens, max_seqlen, None if attention_mask is None else attention_mask.bool())


def reason_to_stay(mask: torch.Tensor) -> str | None:
    """The reason why the padding of a batch with this bool mask cannot be removed, or None."""
    if is_traced():
        return "a traced program cannot depend on how many tokens there are"
    if torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return "a function that torch.func transforms cannot depend on how many tokens there are"
    if mask.dim() != 2:
        return "a mask of pairs of tokens"
    if type(mask) is not torch.Tensor or mask.is_meta:
        return f"a mask without data, a {type(mask).__name__} on {mask.device}"
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a captured program cannot depend on how many tokens there are"
    return None


def _scattered(states: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    return states.new_zeros(total, *states.shape[1:]).index_copy(0, rows, states)
