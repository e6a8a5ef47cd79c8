"""Scale-invariant fine-tuning (SiFT): a model learns to answer alike when its embeddings are slightly moved.

sift = Sift(model)
for batch in loader:
    sift.loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()

Source: He et al., arXiv 2006.03654, section 5 ("Scale invariant fine-tuning"), with the details of Microsoft's code
(DeBERTa/sift/sift.py in microsoft/DeBERTa).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..models.model import DebertaModel, masks

EPSILON = 1e-7  # of the LayerNorm without weights
LEAST_GRADIENT = 1e-6  # keeps an ascent by almost nothing from becoming a whole step
BOUND = 2  # the noise is cut off at this many deviations
# In float16 the small gradients of the divergence would become zero. A power of two changes nothing else.
SCALE = 2.0**10
_EMBEDDINGS = ("DebertaEmbeddings", "DebertaV2Embeddings")


class Sift:
    """Computes the loss of scale-invariant fine-tuning.

    x is the sum of a token's embeddings, N a LayerNorm without weights, f the model from there on: its embeddings'
    own LayerNorm, encoder and head. sg stops gradients. A step computes

        z     = f(N(x))                                                        the logits, and from them the task's loss
        d0    = noise of N(0, deviation^2), cut off at +-2 deviation
        g     = gradient by d0 of sum D(f(sg(N(x)) + d0), sg(z))
        d     = d0 + step g / (max |g| + 1e-6)                                 the largest |g| of each token
        loss  = task + weight mean D(f(sg(N(x)) + d), z)
        D(a, b) = - sg(softmax(b)) . log softmax(a) - sg(softmax(a)) . log softmax(b)

    D lacks the entropies: for n equal classes it is 2 log n at a = b. Its gradient reaches the parameters through both
    a and b. As in Microsoft's code, the embeddings before N learn from z alone, because N(x) + d is a constant of the
    second term. N is in all three passes, so the embeddings' scale never matters while sift trains.

    D takes other distributions where a model has no classes. One logit, or problem_type "regression": D is the squared
    difference. (Microsoft's is constant there.) problem_type "multi_label_classification": every logit is a yes or no
    of its own. start_logits and end_logits: one distribution over the tokens of a text each. Padding never counts.

    A step takes 3 forwards and 2 backwards (the one of ``loss`` among them); dropout is drawn anew in each. Only while
    ``loss`` runs are there hooks on the model. Activation checkpointing works if it is not reentrant.

    Args:
        model: is or contains a DeBERTa of this package, or one of Hugging Face, patched or not. Its output has logits,
            or start_logits and end_logits. It may be wrapped in
            DistributedDataParallel, without find_unused_parameters: that allows one forward for each backward.
        weight: factor of the divergence.
        step: length of the ascent, in units of normalised embeddings.
        deviation: of the noise, in these units.

    Raises:
        TypeError: model is not a module, or a number is none.
        ValueError: model contains no embeddings of a DeBERTa, or a number is out of range.
    """

    def __init__(self, model: nn.Module, weight: float = 5.0, step: float = 1e-4, deviation: float = 1e-2):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.weight = _number("weight", weight, zero=True)
        self.step = _number("step", step)
        self.deviation = _number("deviation", deviation)
        self._norms = [module.LayerNorm for module in model.modules() if _is_embeddings(module)]
        if not self._norms:
            raise ValueError(
                f"model must contain a DeBERTa with its embeddings.LayerNorm, got {type(model).__name__} without one"
            )
        configs = (getattr(module, "config", None) for module in model.modules())
        self._config = next((config for config in configs if hasattr(config, "problem_type")), None)

    def loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Returns the task's loss plus ``weight`` times the divergence, a scalar, float32 or float64.

        Args:
            batch: arguments of the model by name, with labels: padded, or packed with cu_seqlens.

        Raises:
            ValueError: the model returns no loss.
            TypeError: the model returns neither logits nor start_logits and end_logits.
        """
        output, divergence = self.parts(batch)
        if getattr(output, "loss", None) is None:
            raise ValueError(f"batch must hold labels, from which the model computes a loss, got {', '.join(batch)}")
        return _precise(output.loss) + self.weight * divergence

    def parts(self, batch: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
        """Returns what the model returns for the embeddings N(x), and the mean divergence, a scalar.

        For a loss of one's own: loss_of(output) + sift.weight * divergence. ``batch`` may be without labels.
        """
        seen: list[torch.Tensor] = []

        def clean(x: torch.Tensor) -> torch.Tensor:
            normalised = _normalised(x)
            seen.append(normalised.detach())
            return normalised

        with self._entering(clean):
            output = self.model(**batch)
        logits = self._logits(output, batch)
        noise = [_noise(x, self.deviation) for x in seen]
        moved = self._ascended(batch, seen, noise, [(z.detach(), regression) for z, regression in logits])
        again = self._perturbed(batch, seen, moved)
        terms = [_divergence(a, b, regression) for (a, regression), (b, _) in zip(again, logits, strict=True)]
        return output, torch.stack([x.mean() for x in terms]).mean()

    def _ascended(self, batch, seen, noise, logits) -> list[torch.Tensor]:
        """Returns the noise one step further along the gradient of the divergence, of which parameters get nothing."""
        with torch.enable_grad():
            noise = [x.requires_grad_() for x in noise]
            again = self._perturbed(batch, seen, noise)
            terms = [_divergence(a, b, regression).sum() for (a, regression), (b, _) in zip(again, logits, strict=True)]
            gradients = torch.autograd.grad(SCALE * torch.stack(terms).sum(), noise)
        moved = []
        for x, gradient in zip(noise, gradients):
            g = gradient / SCALE
            ascent = self.step * g / (g.abs().amax(-1, keepdim=True) + LEAST_GRADIENT)
            # After an overflow the noise stays as it was drawn.
            moved.append(x.detach() + torch.where(g.isfinite().all(), ascent, torch.zeros_like(ascent)))
        return moved

    def _perturbed(self, batch, seen, deltas) -> list[tuple[torch.Tensor, bool]]:
        """Runs the model on the embeddings N(x) + delta."""
        inputs = iter([(x + delta).to(x.dtype) for x, delta in zip(seen, deltas)])

        def moved(x: torch.Tensor) -> torch.Tensor:
            given = next(inputs, None)
            if given is None or given.shape != x.shape:
                raise RuntimeError("model must call its embeddings alike in every forward of the same batch")
            return given

        with self._entering(moved):
            return self._logits(self.model(**batch), batch)

    @contextlib.contextmanager
    def _entering(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """While it lasts, the embeddings' LayerNorms get ``change`` of their input."""
        hook = lambda module, inputs: (change(inputs[0]), *inputs[1:])
        handles = [norm.register_forward_pre_hook(hook) for norm in self._norms]
        # Checkpointed embeddings would run again in backward, when the hooks are gone.
        native = [module for module in self.model.modules() if isinstance(module, DebertaModel)]
        for module in native:
            module._embed = module.embeddings.__call__  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in native:
                del module._embed
            for handle in handles:
                handle.remove()

    def _logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, bool]]:
        """Returns logits whose last dimension is a distribution, without padding; and whether they are values instead.

        Those of a span's start and end have shape (B, L): one distribution over the tokens of each text.
        """
        names = [name for name in ("logits", "start_logits", "end_logits") if getattr(output, name, None) is not None]
        if names not in (["logits"], ["start_logits", "end_logits"]):
            raise TypeError(
                f"the model's output must have logits, or start_logits and end_logits, got {type(output).__name__} "
                f"with {' and '.join(names) or 'neither'}"
            )
        if names == ["logits"]:
            return [_task_logits(_precise(output.logits), batch, getattr(self._config, "problem_type", None))]
        return [(_over_tokens(_precise(getattr(output, name)), batch), False) for name in names]


def _task_logits(logits: torch.Tensor, batch: Mapping[str, Any], problem: str | None) -> tuple[torch.Tensor, bool]:
    if logits.shape[:-1] == _rows(batch):  # one vector of logits for each token
        logits = logits[_tokens(batch)]
    if problem == "multi_label_classification":
        return torch.stack((logits, torch.zeros_like(logits)), -1), False
    return logits, problem == "regression" or logits.dim() == 1 or logits.shape[-1] == 1


def _over_tokens(logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns (B, L) with the lowest number where there is padding: its probability is zero, and no gradient nan."""
    lowest = torch.finfo(logits.dtype).min
    logits = logits.masked_fill(~_tokens(batch), lowest)
    if logits.dim() == 2:
        return logits
    lengths = batch["cu_seqlens"].diff().tolist()
    return pad_sequence(logits[: sum(lengths)].split(lengths), batch_first=True, padding_value=lowest)


def _rows(batch: Mapping[str, Any]) -> torch.Size:
    """Returns the shape of the tokens, (B, L), or (T,) if they are packed."""
    ids, embeddings = batch.get("input_ids"), batch.get("inputs_embeds")
    if ids is None and embeddings is None:
        raise ValueError(f"batch must hold input_ids or inputs_embeds, got {', '.join(batch)}")
    return ids.shape if ids is not None else embeddings.shape[:-1]  # type: ignore[union-attr]


def _tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns where there is no padding, bool (B, L) or (T,)."""
    rows, mask, ends = _rows(batch), batch.get("attention_mask"), batch.get("cu_seqlens")
    given = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    tokens = torch.ones(rows, dtype=torch.bool, device=given.device)
    if mask is not None:
        tokens = mask.bool() if len(rows) == 1 else masks(mask, *rows)[1]
    return tokens if ends is None else tokens & (torch.arange(rows[0], device=given.device) < ends[-1])


def _divergence(a: torch.Tensor, b: torch.Tensor, regression: bool) -> torch.Tensor:
    """Returns the divergence of every row of logits; of regression, of every value."""
    if regression:
        return (a - b).square()
    log_a, log_b = F.log_softmax(a, -1), F.log_softmax(b, -1)
    return -(log_b.exp().detach() * log_a + log_a.exp().detach() * log_b).sum(-1)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def _noise(x: torch.Tensor, deviation: float) -> torch.Tensor:
    drawn = torch.randn(x.shape, dtype=_precise(x).dtype, device=x.device)
    return (deviation * drawn).clamp(-BOUND * deviation, BOUND * deviation)


def _precise(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_embeddings(module: nn.Module) -> bool:
    """By the name of a class or of its bases, because Hugging Face's library may not be there."""
    return any(base.__name__ in _EMBEDDINGS for base in type(module).__mro__) and hasattr(module, "LayerNorm")


def _number(name: str, value: float, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise ValueError(f"{name} must be {'at least 0' if zero else 'above 0'} and finite, got {value}")
    return float(value)
