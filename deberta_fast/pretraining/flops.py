"""Floating-point operations of a training step, for model FLOPs utilisation (MFU).

A multiplication and an addition count as two. A layer run of a sequence of l tokens takes, forward,

    l (8 H^2 + 4 H F)                     its linear layers: width H, feed-forward F
    4 H l^2 + 2 H n near(l)               Q K^T and P V; n position terms, as op.flops counts them

and the language model's head 2 M H (H + V) for M masked tokens, the discriminator's 2 l H^2. Backward is twice forward.
Recomputed layers, and what kernels compute twice, do not count (Chowdhery et al., arXiv 2204.02311, appendix B).
"""

import torch

from ..models.config import DebertaConfig

# Dense bfloat16 or float16 products in TFLOP/s, from NVIDIA's data sheets.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "A10G": 70, "4090": 165}


def step_flops(config: DebertaConfig, runs: int, lengths: torch.Tensor, masked: int, with_head: bool) -> float:
    """FLOPs of forward and backward of one model.

    Args:
        runs: of layers: N, or N + 1 with the enhanced mask decoder.
        lengths: int64 (n,), the sequences'.
        masked: M; the vocabulary's logits are made for so many tokens.
        with_head: whether there is the discriminator's head.
    """
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    tokens, pairs = int(lengths.sum()), int((lengths * lengths).sum())
    near = int(_near(lengths, config.table_rows // 2).sum()) if config.relative_attention else 0
    layer = tokens * (8 * hidden**2 + 4 * hidden * feed_forward)
    layer += 4 * hidden * pairs + 2 * hidden * len(config.position_terms) * near
    head = 2 * masked * hidden * (hidden + config.vocab_size) + (2 * tokens * hidden**2 if with_head else 0)
    return 3.0 * (runs * layer + head)


def _near(lengths: torch.Tensor, reach: int) -> torch.Tensor:
    """Pairs of each sequence at distances below ``reach``, which have a row of the table of their own."""
    far = (lengths - reach).clamp(min=0)
    return lengths * lengths - far * (far + 1)


def peak_tflops(device: torch.device) -> float | None:
    """The device's peak, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
