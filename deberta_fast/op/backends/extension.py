"""``deberta_fast._C``, the compiled kernels of the CPU and CUDA backends: loaded once, or the reason why not."""

import importlib

import torch

SHARED_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? pos_key, Tensor? pos_query, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? seed, Tensor? slots, int far_past, int far_future, int first_slot"
)
GRADIENTS = (
    "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!)? grad_pos_key, "
    "Tensor(e!)? grad_pos_query, Tensor output, Tensor lse, Tensor grad_output, Tensor grad_lse"
)
_library = torch.library.Library("deberta_fast", "FRAGMENT")


def define(*schemas: str) -> None:
    """Schemas of operators that the extension implements, in the order of its C++ functions."""
    for schema in schemas:
        _library.define(schema)


def _load() -> str | None:
    try:
        importlib.import_module("deberta_fast._C")
    except ImportError as error:
        if getattr(error, "name", None) == "deberta_fast._C" and error.path is None:
            return "the extension deberta_fast._C was not built (pip install -v says why)"
        return f"the extension deberta_fast._C does not load: {error}"
    return None


NOT_LOADED = _load()


def implements(operator: str, key: str) -> bool:
    """Whether the extension was built with this operator for a dispatch key ("CPU", "CUDA")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"deberta_fast::{operator}", key)
