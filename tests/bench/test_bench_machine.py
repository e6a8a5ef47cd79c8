"""Reads oneDNN's report, and checks the operations that are counted."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
REPORT = """onednn_verbose,v1,info,cpu,isa:Intel AVX-512 with Intel DL Boost and bfloat16 support
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32::blocked:ab::f0,,,768x768,0.1
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx10_1_512_amx,undef,src:bf16::blocked:ab::f0,,,64x768:768x768,0.2
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx10_1_512_amx,undef,src:bf16::blocked:ba::f0,,,64x768:768x768,0.2
onednn_verbose,v1,primitive,exec,cpu,matmul,gemm:jit,undef,src:f32::blocked:ab::f0,,,64x768:768x768,0.3
"""


@pytest.fixture
def machine(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("bench.machine")


def test_kernels_are_read(machine):
    assert machine.named(REPORT) == "brg_matmul:avx10_1_512_amx gemm:jit"
    assert machine.named(REPORT.splitlines()[1]) == machine.named("") == "none"


def test_every_call_is_reported_by_its_name(machine):
    reported = machine.kernels(16)
    assert reported.keys() == {(w, d, p) for w in machine.WORK for d in machine.DTYPES for p in machine.PASSES}
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert "matmul" in reported["linear", "bfloat16", "forward"]


@pytest.mark.parametrize("what", ["linear", "sdpa"])
def test_operations_are_those_of_the_calls(machine, what):
    """As torch counts them in the reference implementation of attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for one in machine.PASSES:
        with sdpa_kernel(SDPBackend.MATH):
            run = machine.call(what, "float32", one, 24)
            with FlopCounterMode(display=False) as counter:
                run()
        again = 2 * 24 * 24 * machine.WIDTH if (what, one) == ("sdpa", "backward") else 0  # scores, made again
        assert counter.get_total_flops() + again == machine._operations(what, one, 24)
