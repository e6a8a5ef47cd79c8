"""Training on several processes, on top of torch.distributed."""

from .tensor_parallel import tensor_parallel_plan

__all__ = ["tensor_parallel_plan"]
