"""One process of several: how a model is wrapped, and numbers that all processes share."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Place:
    """Where this process runs. ``rank`` 0 of ``ranks`` 1 needs no process group."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a tensor of all processes up, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    def gathered(self, value) -> list:
        """Returns every process's object, on all of them."""
        if self.ranks == 1:
            return [value]
        found = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found


@contextlib.contextmanager
def started(device: str | None) -> Iterator[Place]:
    """Joins the process group that torchrun has described, if it did, or that is there already."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    own = not dist.is_initialized() and "WORLD_SIZE" in os.environ
    if torch.device(kind).type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"training.device={kind}: torch finds no GPU")
        place = torch.device(kind)
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if place.index is None else place.index)
        torch.cuda.set_device(place)
    else:
        place = torch.device(kind)
    if own:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield Place(place, dist.get_rank(), dist.get_world_size())
        else:
            yield Place(place)
    finally:
        if own:
            dist.destroy_process_group()


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The encoder layers inside a module, in order."""
    return [layer for part in module.modules() if type(part).__name__ == "DebertaEncoder" for layer in part.layer]


def wrapped(objective: nn.Module, place: Place, strategy: str, precision: str, compiled: bool) -> nn.Module:
    """Wraps an objective for training: layers compiled, then shards or replicas where there are several processes."""
    if compiled:
        for layer in layers_of(objective):
            layer.compile()
    if place.ranks == 1:
        return objective
    if strategy == "ddp":
        devices = [place.device.index] if place.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(place.device.type, (place.ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh, **({"mp_policy": policy} if precision == "bf16" else {})}
    for layer in layers_of(objective):
        fully_shard(layer, **options)
    return fully_shard(objective, **options)


@contextlib.contextmanager
def synchronised(module: nn.Module, now: bool) -> Iterator[None]:
    """Leaves gradients of a micro-batch unsummed, unless ``now``: the step's last one sums them all."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(now)
        yield
    elif isinstance(module, nn.parallel.DistributedDataParallel) and not now:
        with module.no_sync():
            yield
    else:
        yield


def precise(place: Place, precision: str, strategy: str):
    """Autocast of forward. Shards have their precision from FSDP."""
    if precision == "fp32" or (strategy == "fsdp" and place.ranks > 1):
        return contextlib.nullcontext()
    return torch.autocast(place.device.type, DTYPES[precision])
