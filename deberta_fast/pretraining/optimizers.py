"""AdamW and its learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def adamw(module: nn.Module, rate: float, weight_decay: float, betas: Iterable[float], eps: float):
    """Makes torch's fused AdamW. Vectors, which are biases and the weights of norms, have no weight decay.

    Microsoft's Adam differs: it does not correct the moments' bias at the start.
    """
    parameters = [x for x in module.parameters() if x.requires_grad]
    groups = [
        {"params": [x for x in parameters if x.dim() > 1], "weight_decay": weight_decay},
        {"params": [x for x in parameters if x.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=tuple(betas), eps=eps, fused=True)


def scheduled(optimizer: torch.optim.Optimizer, kind: str, warmup: int, steps: int):
    """Sets the learning rate of every step: a linear rise, then ``factor``."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(kind, step, warmup, steps))


def factor(kind: str, step: int, warmup: int, steps: int) -> float:
    """The share of the peak rate at a step, from 0 on.

    (s + 1) / w while s < w. Then, with the rest r = (T - s) / (T - w): r ("linear"), (1 - cos(pi r)) / 2 ("cosine") or
    1 ("constant"). Microsoft's schedule is s / w and then 1 - s / T, which falls by w / T at the end of the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    rest = max(0.0, (steps - step) / max(1, steps - warmup))
    return rest if kind == "linear" else (1 - math.cos(math.pi * rest)) / 2
