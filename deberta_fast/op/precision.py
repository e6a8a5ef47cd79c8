"""The precision rule: an implementation may be at most twice as wrong as Hugging Face's eager code in the same dtype.

    max  |got - exact|  <=  2 max  |eager - exact|  +  eps / 2 max |exact|                      (1)
    mean |got - exact|  <=  2 mean |eager - exact|                                              (2)

exact is computed in float64, eager in the dtype of got by ``hf_style_attention``; eps is that dtype's. The maximum
catches a wrong element, and the mean a wrong row of a large tensor. Inputs must have unit variance: with small ones the
position terms are small too, and a wrong table hides behind rounding.

Tests and benchmarks use this rule, and so does the check that a fused backend has to pass on a device (``proof``).
"""

from typing import NamedTuple

import torch

from .call import Call
from .dropout import keep_mask, number_heads, threshold_and_scale
from .relative_position import distance_slots


def hf_style_attention(inputs: Call, first_batch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in the order of operations of Hugging Face's eager code, in the dtype of the inputs throughout.

    It holds Lq x Lk scores per head, and torch's autograd differentiates it.

    Args:
        inputs: a call without cu_seqlens, any floating dtype; query (B, H, Lq, D), key and value (B, H, Lk, D).
        first_batch: number of the first batch row, for dropout.

    Returns:
        Output (B, H, Lq, D) and log-sum-exp (B, H, Lq), both in the dtype of query. A query that sees no key gets the
        mean of value, as in Hugging Face's code; the package's functions give zeros.
    """
    scores = hf_style_scores(inputs)
    probabilities = torch.softmax(scores, -1)
    if inputs.seed is not None and inputs.dropout_p > 0:
        batch, heads, rows, keys = scores.shape
        first_row = torch.arange(first_batch, first_batch + batch, device=scores.device)[:, None]
        head = torch.arange(heads, device=scores.device)
        batch_head = number_heads(inputs.seed, first_row, head, heads)[..., None, None]
        row = torch.arange(rows, device=scores.device)[:, None]
        keep = keep_mask(inputs.seed, batch_head, row, (0, keys), inputs.dropout_p)
        probabilities = probabilities * keep * threshold_and_scale(inputs.dropout_p)[1]
    return probabilities @ inputs.value, torch.logsumexp(scores, -1)


def hf_style_scores(inputs: Call, slots: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """The masked scores of ``hf_style_attention``, (B, H, Lq, Lk).

    The keys are divided by the scale before the content product, the position terms after product and gather.

    Args:
        inputs: as in ``hf_style_attention``.
        slots: rows of pos_key by query and key, (Lq, Lk), and of pos_query by key and query, (Lk, Lq), int64; None
            computes them from the distances. Hugging Face's encoder computes most of them once for all layers.
    """
    query, key = inputs.query, inputs.key
    scale = torch.tensor(1 / inputs.scale, dtype=torch.float32).to(query.dtype)
    scores = query @ (key.mT / scale)
    if inputs.has_positions:
        c2p_slots, p2c_slots = slots or _slots(inputs)
    if inputs.pos_key is not None:
        scores = scores + (query @ inputs.pos_key.mT).gather(-1, c2p_slots.expand_as(scores)) / scale
    if inputs.pos_query is not None:
        scores = scores + (key @ inputs.pos_query.mT).gather(-1, p2c_slots.expand_as(scores.mT)).mT / scale
    if inputs.mask is not None:
        scores = scores.masked_fill(~inputs.mask, torch.finfo(scores.dtype).min)
    return scores


def _slots(inputs: Call) -> tuple[torch.Tensor, torch.Tensor]:
    i, j = (torch.arange(x.shape[2], device=x.device) for x in (inputs.query, inputs.key))
    slots = distance_slots(inputs.device_tables.slots, i[:, None] + inputs.query_offset - j) - inputs.first_slot
    return slots, slots.mT


class Precision(NamedTuple):
    """The errors of one tensor, and its error budget by equations (1) and (2)."""

    largest: float
    largest_allowed: float
    mean: float
    mean_allowed: float

    @property
    def share(self) -> float:
        """The larger of both errors as a share of its bound; above 1 it is too large."""
        pairs = (self.largest, self.largest_allowed), (self.mean, self.mean_allowed)
        # A NaN in eager makes the bound NaN, which allows no error.
        return max(error / allowed if allowed > 0 else float("inf") if error else 0.0 for error, allowed in pairs)

    def __str__(self) -> str:
        if self.largest <= self.largest_allowed:
            return f"mean error {self.mean:.2e}, allowed {self.mean_allowed:.2e}"
        return f"max error {self.largest:.2e}, allowed {self.largest_allowed:.2e}"


def precision(name: str, got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> Precision:
    """Measures one tensor of an attention call by equations (1) and (2): the output, the log-sum-exp or a gradient.

    The first dimension counts draws of random inputs. The largest error is averaged over the draws, because that of one
    draw is noisy: one of two equally precise computations exceeds twice the other in one draw out of a hundred.

    Args:
        name: name of the tensor, for the message.
        got: (draws, ...), the tensor to judge.
        eager: the same shape and dtype, by ``hf_style_attention``.
        exact: the same shape, float64, from the same inputs.

    Raises:
        AssertionError: shapes or dtypes differ, or an element is not finite; the message names the tensor.
    """
    _require(got.shape == exact.shape, f"{name} is of shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    _require(got.dtype == eager.dtype, f"{name} is of dtype {got.dtype}, not {eager.dtype}")
    _require(bool(torch.isfinite(got).all()), f"{name} is not finite")
    error, allowed = ((x.double() - exact).abs().flatten(1) for x in (got, eager))
    if error.numel() == 0:
        return Precision(0.0, 0.0, 0.0, 0.0)
    # Half a unit in the last place of the largest value: the rounding of the result itself.
    rounding = 0.5 * torch.finfo(got.dtype).eps * exact.abs().flatten(1).amax(1).mean()
    largest, largest_allowed = (x.amax(1).mean() for x in (error, allowed))
    # The mean gets no slack. The term far below one rounding lets tensors pass that are zero everywhere.
    figures = largest, 2 * largest_allowed + rounding, error.mean(), 2 * allowed.mean() + 1e-3 * rounding
    return Precision(*(float(x) for x in figures))


def assert_as_precise(name: str, got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Requires equations (1) and (2), as ``precision`` measures them.

    Raises:
        AssertionError: as ``precision``, or an error is too large; the message names the tensor.
    """
    measured = precision(name, got, eager, exact)
    _require(measured.share <= 1, f"{name}: {measured}")


def _require(condition: bool, message: str) -> None:
    # python -O removes assert statements.
    if not condition:
        raise AssertionError(message)
