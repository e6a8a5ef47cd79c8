"""Weights that make the mean over processes and accumulated batches a mean over their items."""

from collections.abc import Sequence

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh


def loss_weights(
    labels: Sequence[torch.Tensor | int], mesh: DeviceMesh | distributed.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """Weights for the losses of this process's accumulated batches: W n_k / N.

        weights = loss_weights([batch["labels"] for batch in batches], mesh)
        for batch, weight in zip(batches, weights):
            (model(**batch).loss * weight).backward()
        optimizer.step()

    n_k is the number of batch k's items, N that of all batches on all W processes. A model's loss is the mean over its
    batch's items, and DistributedDataParallel and FSDP average gradients over processes. So the gradients become those
    of the mean over all items, whichever process and batch they are in.

    A batch without any item has weight 0. The loss of tokens is NaN there, as a mean over nothing, but its gradients
    are zero: nothing needs to be done but ``torch.nan_to_num(loss)`` in a log.

    Args:
        labels: one per batch. Labels of any shape, of which integers below 0 are ignored; floats count by rows. Or the
            number of items, an int. The number of batches may be 0 on some processes.
        mesh: the processes that average gradients: a 1-D mesh or a group. None means all; one process needs no group.

    Returns:
        float32 scalars, on the device of the labels.

    Raises:
        TypeError: an entry is neither a tensor nor an int, or mesh is something else.
        ValueError: a number is negative, or mesh has more than one dimension.
    """
    group, device = _group(mesh), next((x.device for x in labels if isinstance(x, torch.Tensor)), None)
    counts = [_items(f"labels[{index}]", x) for index, x in enumerate(labels)]
    device = _device(mesh, group) if device is None else device
    own = torch.stack([torch.as_tensor(x, device=device) for x in counts]) if counts else torch.zeros(0, device=device)
    total, ranks = own.sum().long(), 1
    if distributed.is_initialized():
        distributed.all_reduce(total, group=group)
        ranks = distributed.get_world_size(group)
    return list((own * ranks / total.clamp(min=1)).float().unbind())


def _items(where: str, labels: torch.Tensor | int) -> torch.Tensor | int:
    if isinstance(labels, torch.Tensor):
        if labels.is_floating_point():
            return labels.shape[0]
        return (labels >= 0).sum()
    if not isinstance(labels, int) or isinstance(labels, bool):
        raise TypeError(f"{where} must be a tensor or a number of items, got {labels!r}")
    if labels < 0:
        raise ValueError(f"{where} must not be negative, got {labels}")
    return labels


def _group(mesh: DeviceMesh | distributed.ProcessGroup | None) -> distributed.ProcessGroup | None:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: mesh[name] selects one")
        return mesh.get_group()
    if mesh is not None and not isinstance(mesh, distributed.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh, a ProcessGroup or None, got {type(mesh).__name__}")
    return mesh


def _device(mesh: DeviceMesh | distributed.ProcessGroup | None, group: distributed.ProcessGroup | None) -> str:
    """The type of a device on which the group can add numbers."""
    if isinstance(mesh, DeviceMesh):
        return mesh.device_type
    return "cuda" if distributed.is_initialized() and distributed.get_backend(group) == "nccl" else "cpu"
