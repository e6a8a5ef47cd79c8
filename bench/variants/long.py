"""Training steps on one long text: a model with a label per token, forward and backward."""

import functools
import math
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForTokenClassification

import deberta_fast

from .. import models, timing
from .model import SCORES_HELD, VOCABULARY, Size, draw_weights
from .model import SIZES as ENCODERS

# Two layers make the parts that checkpointing cannot save easy to see.
SIZES = {"2-layers": Size(2, 256, 4, 1024)} | {name: sizes[0] for name, sizes in ENCODERS.items()}
SHORT = 512  # tokens of a step before the measured one
GRADIENTS = ("deberta.embeddings.word_embeddings.weight", "deberta.encoder.rel_embeddings.weight")


class Variant(NamedTuple):
    """A description; build(Hugging Face's model) makes the model; the processes that share a text."""

    about: str
    build: Callable[[nn.Module], nn.Module]
    processes: int = 1


class Measured(NamedTuple):
    """A training step: seconds, bytes above the model after forward and at most, loss, and norms of ``GRADIENTS``."""

    seconds: float
    kept: int | None
    peak: int
    loss: float
    norms: list[float]


def original(size: str, dropout: float, dtype: torch.dtype, device: str) -> DebertaV2ForTokenClassification:
    """Makes Hugging Face's DeBERTa v3, whose parameters all variants share."""
    probabilities = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    shape = models.V3_BASE | SIZES[size]._asdict() | {"vocab_size": VOCABULARY}
    with torch.device(device):
        model = DebertaV2ForTokenClassification(DebertaV2Config(**shape, **probabilities)).to(dtype)
    draw_weights(model)
    return model


def patched(model: nn.Module) -> nn.Module:
    return deberta_fast.patch(models.sharing_parameters(model))


def native(model: nn.Module) -> deberta_fast.DebertaV2ForTokenClassification:
    names = (*models.V3_BASE, "hidden_dropout_prob", "attention_probs_dropout_prob")
    config = deberta_fast.DebertaV2Config(**{name: getattr(model.config, name) for name in names})
    return models.native(deberta_fast.DebertaV2ForTokenClassification, config, model)


def checkpointed(model: nn.Module) -> nn.Module:
    model = native(model)
    model.gradient_checkpointing_enable()
    return model


def checkpointed_but_attention(model: nn.Module) -> nn.Module:
    model = native(model)
    model.gradient_checkpointing_enable(keep_attention=True)
    return model


def parallel(method: str, model: nn.Module) -> nn.Module:
    from deberta_fast.distributed import context_parallel

    return context_parallel(native(model), method=method)


VARIANTS = {
    "hf": Variant("Hugging Face's eager model", lambda model: model),
    "patched": Variant("the same after deberta_fast.patch", patched),
    "native": Variant("this package's model on the same weights", native),
    "checkpointed": Variant("native after gradient_checkpointing_enable()", checkpointed),
    "but-attention": Variant("the same with keep_attention=True", checkpointed_but_attention),
    "ring-2": Variant(
        'native by context_parallel(method="ring") on two processes (gloo), of which the larger figure counts',
        functools.partial(parallel, "ring"),
        processes=2,
    ),
    "heads-2": Variant('the same with method="heads"', functools.partial(parallel, "heads"), processes=2),
}


class Step:
    """A variant's training step. Dropout draws differ among variants."""

    def __init__(self, variant: str, model: nn.Module, device: str):
        self.name, self.variant, self.device = variant, VARIANTS[variant], device
        self.model = self.variant.build(model).train()

    def loss(self, length: int) -> torch.Tensor:
        """Runs forward on random tokens and labels, the same for every variant."""
        generator = torch.Generator().manual_seed(length)
        draw = functools.partial(torch.randint, size=(1, length), generator=generator)
        batch = {"input_ids": draw(1, VOCABULARY).to(self.device), "labels": draw(0, 2).to(self.device)}
        if self.variant.processes > 1:
            from deberta_fast.distributed import shard_batch

            batch = shard_batch(batch)
        return self.model(**batch).loss

    def measure(self, length: int) -> Measured:
        """Measures one step after a short one, which initialises libraries and allocates gradients and scratch."""
        self.loss(min(length, SHORT)).backward()
        self.model.zero_grad(set_to_none=False)
        memory, synchronize = timing.Memory(self.device), timing.synchronize
        synchronize()
        start = time.perf_counter()
        loss = self.loss(length)
        synchronize()
        seconds = time.perf_counter() - start
        kept = memory.now()
        start = time.perf_counter()
        loss.backward()
        synchronize()
        seconds += time.perf_counter() - start
        return Measured(seconds, kept, memory.peak(), loss.item(), self._norms())

    def _norms(self) -> list[float]:
        gradients = [self.model.get_parameter(name).grad for name in GRADIENTS]
        if self.variant.processes > 1:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient /= self.variant.processes
        return [gradient.float().norm().item() for gradient in gradients]


def difference(got: Measured, want: Measured) -> float:
    """Returns the largest relative difference of the loss and the norms of gradients; infinite if one is not finite."""
    pairs = zip((got.loss, *got.norms), (want.loss, *want.norms), strict=True)
    found = [abs(x - y) / abs(y) for x, y in pairs]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def columns(found: list[Measured], length: int, least: float) -> dict:
    """Returns the columns of a row: medians of measurements, and their ratios to ``least`` bytes."""
    seconds, peak = median(each.seconds for each in found), median(each.peak for each in found)
    kept = None if found[0].kept is None else median(each.kept for each in found)
    return {
        "steps": len(found),
        "s": seconds,
        "s/1000 tokens": 1000 * seconds / length,
        "kept MiB": kept and kept / timing.MIB,
        "peak MiB": peak / timing.MIB,
        "kept/least": kept and kept / least,
        "peak/least": peak / least,
    }


def least_bytes(size: str, length: int, itemsize: int) -> int:
    """Returns the bytes of the hidden states that checkpointing needs: the input of each layer, and the last output."""
    shape = SIZES[size]
    return length * shape.hidden_size * itemsize * (shape.num_hidden_layers + 1)


def predicted_bytes(variant: str, size: str, length: int, itemsize: int) -> int:
    """Counts the tensors at the peak, which is in the last feed-forward's backward. Dropout's masks are not counted.

    In hidden states, with a feed-forward f times as wide, a layer keeps: its input, q, k, v, attention's output, the
    sums before both norms, the first norm's output, GELU's input and output: 8 + 2f. The embeddings' norm, which
    checkpointing computes again, and the head keep one each. At the peak, the head's and the last sum are gone; their
    gradient and GELU's are there: f more.
    """
    layers, hidden, heads, wide = SIZES[size]
    f = wide / hidden
    states = {
        "checkpointed": layers + 7 + 3 * f,  # the inputs of all layers, and everything of the last one
        "but-attention": 2 * layers + 6 + 3 * f,
    }.get(variant, layers * (8 + 2 * f) + 1 + f)
    scores = 0.0
    if variant == "hf":
        at_once, by_layer = SCORES_HELD["forward+backward"]
        scores = (at_once + by_layer * layers) * heads * length**2
    return int((states * length * hidden + scores) * itemsize / VARIANTS[variant].processes)
