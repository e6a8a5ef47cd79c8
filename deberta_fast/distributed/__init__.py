"""Training on several processes, on top of torch.distributed."""

from ..op.context_parallel import disentangled_attention_context_parallel
from .context_parallel import context_parallel, shard_batch, unshard
from .loss_weights import loss_weights
from .tensor_parallel import tensor_parallel_plan

__all__ = [
    "context_parallel",
    "disentangled_attention_context_parallel",
    "loss_weights",
    "shard_batch",
    "tensor_parallel_plan",
    "unshard",
]
