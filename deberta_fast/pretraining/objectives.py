"""What one step of pretraining computes: losses of a masked batch, and figures that say how good the model is.

Each objective is a module whose forward takes a batch, so that DistributedDataParallel, FSDP and torch.compile see the
call. Losses are means over a batch's items in float32 at least.

Masked language model (MLM): L_G = mean over masked tokens i of -log softmax(z_i)[x_i] (Devlin et al., arXiv
1810.04805). The logits z_i = LayerNorm(gelu(W h_i + b)) E^T + bias are made for the M masked tokens alone, (M, V). With
the enhanced mask decoder, h comes from the last layer's two runs with absolute positions (He et al., arXiv 2006.03654,
section 3.2).

Replaced-token detection (RTD): the generator's distribution replaces each masked token by x~_i ~ softmax(z_i / T), from
the logits that also gave the loss. A token drawn equal to the original counts as original. The discriminator predicts
y_i of every token: L_D = mean over all tokens of the binary cross entropy of y_i and [x~_i != x_i] (Clark et al., arXiv
2003.10555, section 2; He et al., arXiv 2111.09543, section 2.3).
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .sharing import ReplacedTokenModels


class MaskedBatch(NamedTuple):
    """Packed sequences with some of their tokens hidden.

    Attributes:
        input_ids: int64 (T,), the original tokens.
        hidden_ids: int64 (T,), with masked tokens replaced.
        places: int64 (M,), the masked tokens' rows in ascending order.
        cu_seqlens: int32 (n + 1,), see ``DebertaModel.forward``.
        position_ids: int64 (T,), each token's place in its sequence.
        max_seqlen: at least the longest sequence's length.
    """

    input_ids: torch.Tensor
    hidden_ids: torch.Tensor
    places: torch.Tensor
    cu_seqlens: torch.Tensor
    position_ids: torch.Tensor
    max_seqlen: int

    def to(self, device: torch.device) -> "MaskedBatch":
        return MaskedBatch(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self))

    @property
    def sequences(self) -> dict:
        """The keywords of a model's forward that describe the sequences."""
        return dict(cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen, position_ids=self.position_ids)


class Predicted(NamedTuple):
    """What a language model makes of a batch: the loss, a scalar; how many of the M tokens it predicts right; and
    tokens drawn from its distribution, int64 (M,), or None."""

    loss: torch.Tensor
    right: torch.Tensor
    drawn: torch.Tensor | None


class Detected(NamedTuple):
    """What a discriminator makes of a batch: the loss, a scalar; its logits and the labels 0 or 1, both (T,)."""

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


class MaskedTokens(nn.Module):
    """The masked language model's objective.

    Args:
        model: a ``DebertaForMaskedLM``.
        temperature: T of the tokens drawn; None draws none.
    """

    def __init__(self, model: nn.Module, temperature: float | None = None):
        super().__init__()
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.model, self.temperature = model, temperature

    def forward(self, batch: MaskedBatch) -> Predicted:
        states, _ = self.model.predicting_states(batch.hidden_ids, **batch.sequences)
        logits = self.model.lm_predictions(states.index_select(0, batch.places), self.model.get_input_embeddings())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = batch.input_ids.index_select(0, batch.places)
        loss = F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))
        with torch.no_grad():
            right = (logits.argmax(-1) == targets).sum()
            drawn = None if self.temperature is None else draw(logits, self.temperature)
        return Predicted(loss, right, drawn)


def draw(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draws a token from each row of softmax(logits / temperature), (M, V) to int64 (M,), with torch's generator.

    By inverting the cumulative distribution: the first token where it exceeds u ~ U(0, 1). In float64, so that sums
    over all words keep the small probabilities. That is one random number a row; torch.multinomial makes V of them,
    which took three times as long on a CPU, and refuses more than 2^24 words.
    """
    sums = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    places = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device) * sums[:, -1:]
    # Past the end lies only what is not a number: the step that made it says so.
    return torch.searchsorted(sums, places, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


class ReplacedTokens(nn.Module):
    """The discriminator's objective. ``model`` is a ``DebertaForReplacedTokens``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: MaskedBatch, drawn: torch.Tensor) -> Detected:
        replaced = batch.input_ids.index_copy(0, batch.places, drawn)
        labels = (replaced != batch.input_ids).long()
        output = self.model(replaced, labels=labels, **batch.sequences)
        return Detected(output.loss, output.logits.detach(), labels)


class BothTokens(nn.Module):
    """Both objectives in one pass, for embeddings with gradients of both: L_G + weight L_D.

    The caller weighs the losses, because their means are over different numbers of tokens.
    """

    def __init__(self, models: ReplacedTokenModels, temperature: float):
        super().__init__()
        self.models = models
        # These share the parameters of ``models`` and must not list them twice.
        self._parts = (MaskedTokens(models.generator, temperature), ReplacedTokens(models.discriminator))

    def forward(self, batch: MaskedBatch) -> tuple[Predicted, Detected]:
        generator, discriminator = self._parts
        predicted = generator(batch)
        return predicted, discriminator(batch, predicted.drawn)
