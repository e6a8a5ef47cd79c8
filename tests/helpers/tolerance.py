"""How wrong a backend may be: at most twice what Hugging Face's way of computing gets wrong in the same dtype."""

import functools

import torch

from deberta_fast.op.dropout import keep_mask
from deberta_fast.op.relative_position import distance_slots


def hf_style_attention(inputs):
    """Output and log-sum-exp the way Hugging Face's eager code orders its operations, in the dtype of the inputs.

    The keys are divided before c2c, the position terms after product and gather, and nothing leaves the dtype.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    arange = functools.partial(torch.arange, device=query.device)
    scale = torch.tensor(1 / inputs.scale, dtype=torch.float32).to(query.dtype)
    scores = query @ (key.mT / scale)
    if inputs.has_positions:
        i = arange(query.shape[2])[:, None] + inputs.query_offset
        slots = distance_slots(inputs.device_tables.slots, i - arange(key.shape[2])) - inputs.first_slot
        slots = slots.expand(*scores.shape)
    if inputs.pos_key is not None:
        scores = scores + (query @ inputs.pos_key.mT).gather(-1, slots) / scale
    if inputs.pos_query is not None:
        scores = scores + (key @ inputs.pos_query.mT).gather(-1, slots.mT).mT / scale
    if inputs.mask is not None:
        scores = scores.masked_fill(~inputs.mask, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, -1)
    if inputs.dropout_p > 0:
        batch_head = arange(query.shape[0] * query.shape[1]).view(*query.shape[:2], 1, 1)
        rows = arange(query.shape[2])[:, None]
        keep = keep_mask(inputs.seed, batch_head, rows, (0, key.shape[2]), inputs.dropout_p)
        probabilities = probabilities * keep / (1 - inputs.dropout_p)
    return probabilities @ value, torch.logsumexp(scores, -1)


def assert_as_precise(name, got, eager, exact):
    """The rule: against ``exact`` (float64), max and mean error of ``got`` at most twice those of ``eager``.

    The first dimension counts draws of random inputs. The largest error is averaged over them: that of a single draw is
    a matter of luck, and of two equally precise computations one is beyond twice the other once in a hundred times.
    Half a unit in the last place of the largest value is granted to it: the rounding of the result itself.
    """
    assert got.shape == exact.shape and got.dtype == eager.dtype, name
    assert torch.isfinite(got).all(), f"{name} is not finite"
    error, allowed = ((x.double() - exact).abs().flatten(1) for x in (got, eager))
    if error.numel() == 0:
        return
    rounding = 0.5 * torch.finfo(got.dtype).eps * exact.abs().flatten(1).amax(1).mean()
    largest, largest_allowed = (x.amax(1).mean() for x in (error, allowed))
    assert largest <= 2 * largest_allowed + rounding, f"{name}: max error {largest:.2e}, eager's {largest_allowed:.2e}"
    # The mean has no slack of its own; a term far below the rounding of any entry keeps exact zeros comparable.
    tiny = 1e-3 * rounding
    assert error.mean() <= 2 * allowed.mean() + tiny, (
        f"{name}: mean error {error.mean():.2e}, eager's {allowed.mean():.2e}"
    )
