"""Training on several processes, on top of torch.distributed."""

from ..op.context_parallel import disentangled_attention_context_parallel
from .loss_weights import loss_weights
from .tensor_parallel import tensor_parallel_plan

__all__ = ["disentangled_attention_context_parallel", "loss_weights", "tensor_parallel_plan"]
