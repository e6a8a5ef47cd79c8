"""Context parallel: every process has a stretch of each sequence, and attention reads the keys of all.

    context_parallel(model, mesh["context"])
    model = DistributedDataParallel(model)  # or fully_shard, over the same processes and those of data parallel
    for batch in loader:  # the same batch on all processes of mesh["context"]
        loss = model(**shard_batch(batch, mesh["context"])).loss
        loss.backward()

The names follow torch's ``context_parallel`` and ``context_parallel_unshard``.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..hf.fallback import MARK, hf_class
from ..hf.sharded import settings_of, share
from ..models.attention import DisentangledSelfAttention
from ..models.model import DebertaModel
from ..models.sharding import ContextParallel, gathered
from ..op.context_parallel import METHODS
from ..op.context_parallel.exchange import agree, require_equal
from ..op.context_parallel.stretches import Stretches, even_stretches
from .groups import group_of

Mesh = DeviceMesh | dist.ProcessGroup | None


def context_parallel(model: nn.Module, mesh: Mesh | bool = None, method: str = "ring") -> nn.Module:
    """Makes every DeBERTa inside ``model`` share its sequences with the other processes of ``mesh``, in place.

    Each process then calls the model with its stretch of a batch (``shard_batch``). Outputs of tokens are those of the
    stretch (``unshard`` joins them). Outputs of sequences, and the loss, are those of the whole batch, on every process.
    A process's gradients hold its share times the number of processes, so that their mean is the gradient:
    DistributedDataParallel and FSDP take the mean over these processes and those of data parallel at once.

    Attention dropout is that of one process with the whole batch. Other dropout is independent on each process: seed
    them differently. Every forward and backward pass communicates, in evaluation too, so all processes must run it.

    Args:
        model: a native model, or one that ``patch`` patched, or a module that contains some.
        mesh: the processes: a DeviceMesh of one dimension (``mesh["context"]`` of a larger one), a ProcessGroup, or
            None for all. False ends the sharing.
        method: "ring" or "heads", see ``disentangled_attention_context_parallel``.

    Returns:
        ``model``.

    Raises:
        ValueError: model contains neither; a Hugging Face model is not patched; it has talking heads; or the processes
            do not divide the number of heads (method "heads").
        TypeError, RuntimeError: mesh is not as described, or torch.distributed is not initialised.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    context = None if mesh is False else ContextParallel(group_of(mesh), method)
    natives = [module for module in model.modules() if isinstance(module, DebertaModel)]
    if not natives and not settings_of(model):
        raise ValueError(
            f"model must be or contain a native or patched DeBERTa, got a {type(model).__name__} with neither: "
            "call deberta_fast.patch(model) first"
        )
    if context is not None:
        for name, module in model.named_modules():
            _check_attention(name, module, context)
    for module in natives:
        module.context = context
    share(model, context)
    return model


def _check_attention(name: str, module: nn.Module, context: ContextParallel) -> None:
    """Raises ValueError if this attention cannot share its sequences."""
    own = hf_class(type(module))
    patched = own is not None and own.__name__ == "DisentangledSelfAttention"
    if not (patched or isinstance(module, DisentangledSelfAttention)):
        return
    if patched and MARK not in vars(module):
        raise ValueError(f"{name} is Hugging Face's and not patched: call deberta_fast.patch(model) first")
    if getattr(module, "talking_head", False):
        raise ValueError(f"{name} has talking heads, which are computed densely by one process")
    processes, heads = context.group.size(), module.num_attention_heads
    if context.method == "heads" and heads % processes:
        raise ValueError(
            f"method='heads' needs a number of heads that {processes} processes divide, got {heads}: "
            "method='ring' takes any"
        )


def shard_batch(batch: Mapping[str, Any], mesh: Mesh = None, *, token_labels: bool | None = None) -> dict[str, Any]:
    """Cuts this process's stretch out of a batch that all processes of ``mesh`` have.

    Args:
        batch: arguments of a model: input_ids or inputs_embeds with the other entries of the same (B, L) or
            (B, C, L); or packed sequences, (T,) with cu_seqlens. All processes must have the same.
        mesh: see ``context_parallel``.
        token_labels: whether labels are those of tokens. None takes integers of input_ids' shape for that.

    Returns:
        A dictionary with this process's columns, or rows, of all entries of tokens. Others stay whole: labels and
        positions of sequences, cu_seqlens.

    Raises:
        TypeError, ValueError: an entry is not as described, there are fewer tokens than processes, or the batches of
            the processes differ in keys, shapes or token ids. All processes raise.
    """
    group = group_of(mesh)

    def described() -> tuple:
        shape, ids = _shape(batch), batch.get("input_ids")
        if shape[-1] < group.size():
            raise ValueError(f"{shape[-1]} columns or rows cannot be cut for {group.size()} processes")
        shapes = {name: tuple(x.shape) for name, x in batch.items() if isinstance(x, torch.Tensor)}
        for name in _cut(batch, shape, token_labels):
            if shapes[name][-1 if name != "inputs_embeds" else -2] != shape[-1]:
                raise ValueError(f"{name} must be of shape {shape} as the tokens, got {shapes[name]}")
        return sorted(batch), shapes, None if ids is None else _checksum(ids)

    require_equal(agree(group, described), "the batch (its keys, shapes and the checksum of its ids)")
    shape = _shape(batch)
    stretches = Stretches(even_stretches(shape[-1], group.size()), group.rank())
    local = dict(batch)
    for name in _cut(batch, shape, token_labels):
        local[name] = batch[name].narrow(-1 if name != "inputs_embeds" else -2, stretches.start, stretches.length)
    return local


def unshard(x: torch.Tensor, mesh: Mesh = None, *, dim: int = 1) -> torch.Tensor:
    """Joins what all processes of ``mesh`` have of a tensor, on every process; differentiable.

    Args:
        x: this process's part, such as logits (B, L_r, N), or (T_r, N) of packed rows.
        mesh: see ``context_parallel``.
        dim: the dimension that is cut: 1, or 0 of packed rows.

    Raises:
        TypeError, ValueError: x is no tensor with that dimension, or the parts differ in dtype or other sizes.
    """
    group = group_of(mesh)

    def described() -> tuple:
        if not isinstance(x, torch.Tensor) or not -x.dim() <= dim < x.dim():
            form = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor with dimension {dim}, got {form}")
        rest = list(x.shape)
        return rest.pop(dim), (rest, x.dtype)

    found = agree(group, described)
    require_equal([rest for _, rest in found], "the other sizes and the dtype")
    return gathered(x, [length for length, _ in found], dim, group)


_OF_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


def _shape(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the tokens, whose last dimension is cut."""
    ids, embeddings = batch.get("input_ids"), batch.get("inputs_embeds")
    given = ids if embeddings is None else embeddings
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"batch must have tensors, input_ids or inputs_embeds, got {sorted(batch)}")
    shape = tuple(given.shape if embeddings is None else given.shape[:-1])
    packed = batch.get("cu_seqlens") is not None
    if len(shape) not in ((1,) if packed else (2, 3)):
        form = "(T,) with cu_seqlens" if packed else "(B, L), or (B, C, L) for multiple choice"
        raise ValueError(f"input_ids must be of shape {form}, got {shape}")
    return shape


def _cut(batch: Mapping[str, Any], shape: tuple[int, ...], token_labels: bool | None) -> list[str]:
    """The entries that have one value per token."""
    names = [name for name in _OF_TOKENS if batch.get(name) is not None]
    labels = batch.get("labels")
    if labels is not None and token_labels is None:
        token_labels = tuple(labels.shape) == shape and not labels.is_floating_point()
    return [*names, "labels"] if labels is not None and token_labels else names


def _checksum(ids: torch.Tensor) -> int:
    """A number that differs if ids or their order do, but for rare chance."""
    places = torch.arange(1, ids.numel() + 1, device=ids.device) % 65521
    return int((ids.flatten().long() * places).sum())
