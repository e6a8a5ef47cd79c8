"""Training on several processes, on top of torch.distributed."""

from .loss_weights import loss_weights
from .tensor_parallel import tensor_parallel_plan

__all__ = ["loss_weights", "tensor_parallel_plan"]
