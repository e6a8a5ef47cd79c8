"""Loads ``deberta_fast._C``, the compiled kernels of the CPU and CUDA backends, once, or keeps the reason why not.

Both devices implement the same operators for attention. Their arguments are the tensors that they write, and those of
csrc/given.h.
"""

import importlib

import torch

from ..call import TENSORS, Call

_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? pos_key, Tensor? pos_query, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? seed, Tensor? slots, Tensor? first_of_slot, int far_past, int far_future, int past_row, int future_row, "
    "int first_slot, int query_offset, int max_seqlen, float scale, float band_scale, float dropout_p"
)
SCHEMAS = (
    f"fused_forward(Tensor(a!) output, Tensor(b!)? lse, {_CALL}) -> ()",
    "fused_backward(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!)? grad_pos_key, "
    f"Tensor(e!)? grad_pos_query, Tensor output, Tensor lse, Tensor grad_output, Tensor? grad_lse, {_CALL}) -> ()",
    "add_norm(Tensor(a!) output, Tensor(b!)? sum, Tensor(c!)? statistics, Tensor x, Tensor residual, Tensor weight, "
    "Tensor bias, float eps) -> ()",
    "add_norm_backward(Tensor(a!) grad_sum, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor grad_output, "
    "Tensor sum, Tensor statistics, Tensor weight) -> ()",
    "use_instruction_set(str name) -> ()",
    "built_instruction_sets() -> str",
    "bfloat16_instruction_sets() -> str",
    "same_bits(Tensor x, Tensor y) -> bool",
    "release_memory() -> int",
    "finds_torch_stream() -> bool",
    "cuda_architectures() -> str",
    "limit_near_bytes(int bytes) -> ()",
)
_library = torch.library.Library("deberta_fast", "FRAGMENT")
for _schema in SCHEMAS:
    _library.define(_schema)


def _load() -> str | None:
    try:
        importlib.import_module("deberta_fast._C")
    except ImportError as error:
        if getattr(error, "name", None) == "deberta_fast._C" and error.path is None:
            return "the extension deberta_fast._C was not built (pip install -v says why)"
        return f"the extension deberta_fast._C does not load: {error}"
    return None


NOT_LOADED = _load()

# The overloads: looking one up in every call takes longer than checking its arguments.
fused_forward = torch.ops.deberta_fast.fused_forward.default
fused_backward = torch.ops.deberta_fast.fused_backward.default


def implements(operator: str, key: str) -> bool:
    """Returns whether the extension was built with this operator for a dispatch key ("CPU", "CUDA")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"deberta_fast::{operator}", key)


def arguments(call: Call) -> tuple:
    """Returns a call as the operators take it, after the tensors that they write."""
    if call.pos_key is None and call.pos_query is None:
        geometry = (None, None, 0, 0, 0, 0, 0)
    else:
        slots, first_of_slot, far_past, far_future, past_slot, future_slot = call.device_tables
        first = call.first_slot
        geometry = (slots, first_of_slot, far_past, far_future, past_slot - first, future_slot - first, first)
    return *call[:TENSORS], *geometry, call.query_offset, call.max_seqlen, call.scale, call.band_scale, call.dropout_p
