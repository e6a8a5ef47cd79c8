"""Backward of calls that have only a part of each query's keys, with the output and log-sum-exp over all of them.

The parts' gradients add up to those of the whole call, which the reference computes in float64.
tests/op/cuda_emulated.py and tests/op/triton_interpreted.py do the same for the kernels of GPUs.
"""

from contextlib import nullcontext

import pytest
import torch
from cases import BY_NAME, ON_CPU, Case, make_inputs
from comparison import compare, compare_draws
from parts import Part, attention_in_parts, cut_at

from deberta_fast.op import backends
from deberta_fast.op.backends import cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EAGER = [("eager", dtype) for dtype in (*DTYPES, "fp64")]
SETS = [(name, dtype) for dtype in DTYPES for name in (cpu.instruction_sets(DTYPES[dtype]) if "cpu" in ON_CPU else [])]

CASES = {
    "uneven": (BY_NAME["ragged-L129-D64"], (50, 97)),
    "one-key": (BY_NAME["ragged-L129-D64"], (1,)),
    "c2p-only": (BY_NAME["ragged-L129-D64-c2p-only"], (64,)),
    "p2c-only": (BY_NAME["ragged-L129-D64-p2c-only"], (64,)),
    "neither": (BY_NAME["ragged-L129-D64-neither"], (30, 31)),
    "far": (Case("", 400, 450, batch=1, heads=2, size=16, offset=30), (100, 300)),
    "holes": (BY_NAME["holes-L200"], (77, 130)),
    "first-part-hidden": (Case("", 150, 150, mask="late"), (80,)),
    "last-part-hidden": (Case("", 150, 150, mask="right"), (60, 140)),
    "rows-without-keys": (BY_NAME["pairwise-mask-L150"], (61,)),
    "batch-row-without-keys": (BY_NAME["whole-row-padded-L140"], (61,)),
    "table-window": (BY_NAME["table-window-L20"], (7,)),
    "dropout": (Case("", 140, 143, mask="right", dropout_p=0.3), (40, 104)),
}


def run_by(name):
    """Runs a backend or, within the context, the cpu backend by one of its instruction sets."""
    return ("eager", nullcontext()) if name == "eager" else ("cpu", cpu.using(name))


@pytest.mark.parametrize("name, dtype", EAGER + SETS)
@pytest.mark.parametrize("case", CASES)
def test_parts_add_up(case, name, dtype):
    whole, cuts = CASES[case]
    backend, context = run_by(name)
    with context:
        compare(attention_in_parts(backend, cut_at(*cuts)), whole, DTYPES.get(dtype, torch.float64))


def self_and_before(whole):
    """Divides the whole call of ``test_packed_part`` into packed sequences that see themselves, and keys before."""
    ends = torch.tensor([0, 60, 93], dtype=torch.int32)
    query, key, value = whole[:3]
    own = whole._replace(
        key=key[:, :, 40:], value=value[:, :, 40:], mask=None, cu_seqlens=ends, max_seqlen=60, query_offset=0
    )
    before = whole._replace(query=query[:, :, :60], key=key[:, :, :40], value=value[:, :, :40], mask=None)
    return [Part(slice(0, 93), slice(40, 133), own), Part(slice(0, 60), slice(0, 40), before)]


@pytest.mark.parametrize("name, dtype", EAGER[:3] + SETS)
def test_packed_part(name, dtype):
    """Two sequences of 60 and 33 rows, of which the first also sees 40 keys before its own."""
    mask = torch.zeros(1, 1, 93, 133, dtype=torch.bool)
    mask[..., :60, :100], mask[..., 60:, 100:] = True, True
    case = Case("", 93, 133, batch=1, offset=40)
    draws = [make_inputs(case, DTYPES[dtype], draw)._replace(mask=mask) for draw in range(4)]
    backend, context = run_by(name)
    with context:
        compare_draws(attention_in_parts(backend, self_and_before), draws)


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
def test_one_part_is_the_whole(backend):
    """With all keys the results differ only by rounding, whether the call is partial or not."""
    call = make_inputs(BY_NAME["holes-L200"], torch.float32)
    output, lse = backends.forward(call, backend)
    grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    results = [
        backends.backward(call, backend, output, lse.clone(), grad_output, grad_lse, partial=partial)
        for partial in (False, True)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
