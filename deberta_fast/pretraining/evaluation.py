"""How good a language model and a discriminator are on held-out rows, with the same masks every time."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from .objectives import MaskedBatch
from .parallel import Place


@torch.no_grad()
def evaluate(
    forward: Callable, modules: Sequence[nn.Module], batches: Iterable[MaskedBatch], place: Place
) -> dict[str, float]:
    """Evaluates both objectives over all processes' batches.

    Args:
        forward: takes a batch; returns what ``MaskedTokens`` and ``ReplacedTokens`` return, None for the latter in MLM.
        modules: are set to evaluation mode, and back.
        batches: this process's. All processes must have as many.

    Returns:
        mlm_loss, mlm_perplexity (e to the loss), mlm_accuracy over masked tokens; and with a detector rtd_loss,
        rtd_accuracy, original (the share of original tokens, which is the accuracy of answering "original" always),
        precision, recall (of replaced tokens) and auc (area under the ROC curve).

    Random numbers of training are left as they were: the same tokens are drawn in every evaluation.
    """
    was_training = [x.training for x in modules]
    sums = torch.zeros(4, dtype=torch.float64)  # of losses, right and masked tokens; and of the detector's losses
    logits, labels = [], []
    devices = [place.device] if place.device.type == "cuda" else []
    try:
        for module in modules:
            module.eval()
        with torch.random.fork_rng(devices):
            torch.manual_seed(place.rank)
            for batch in batches:
                batch = batch.to(place.device)
                predicted, detected = forward(batch)
                masked = len(batch.places)
                sums += torch.tensor([predicted.loss.item() * masked, predicted.right.item(), masked, 0.0])
                if detected is None:
                    continue
                sums[3] += detected.loss.item() * len(detected.labels)
                logits.append(detected.logits.float().cpu())
                labels.append(detected.labels.cpu())
    finally:
        for module, training in zip(modules, was_training):
            module.train(training)
    sums = place.summed(sums.to(place.device) if place.device.type == "cuda" else sums).cpu()
    loss = sums[0].item() / max(1.0, sums[2].item())
    figures = {
        "mlm_loss": loss,
        "mlm_perplexity": math.exp(min(loss, 700.0)),
        "mlm_accuracy": sums[1].item() / max(1.0, sums[2].item()),
    }
    if not logits:
        return figures
    found = place.gathered((torch.cat(logits), torch.cat(labels)))
    logits = torch.cat([x[0] for x in found])
    labels = torch.cat([x[1] for x in found])
    return figures | {"rtd_loss": sums[3].item() / len(labels)} | detection(logits, labels)


def detection(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Figures of logits and labels 0 or 1, both (N,); NaN where nothing was, or was said to be, replaced."""
    said, replaced = logits > 0, labels > 0
    hits, number = (said & replaced).sum().item(), replaced.sum().item()
    return {
        "rtd_accuracy": (said == replaced).float().mean().item(),
        "original": 1 - number / len(labels),
        "precision": hits / said.sum().item() if said.any() else math.nan,
        "recall": hits / number if number else math.nan,
        "auc": area_under_roc(logits, labels),
    }


def area_under_roc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The probability that a replaced token has a higher logit than an original one; equal logits count half.

    (sum of the ranks of replaced tokens - n1 (n1 + 1) / 2) / (n0 n1), ranks from 1 on, equal ones their mean (Mann and
    Whitney).
    """
    replaced = labels > 0
    ones = int(replaced.sum())
    zeros = len(labels) - ones
    if not ones or not zeros:
        return math.nan
    _, group, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[group]
    return ((ranks[replaced].sum().item()) - ones * (ones + 1) / 2) / (zeros * ones)
