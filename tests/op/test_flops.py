"""torch's FlopCounterMode sees the fused operators."""

import subprocess
import sys

import pytest
import torch
from cases import BY_NAME, CASES, ON_CPU, Case, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from deberta_fast import disentangled_attention, disentangled_attention_varlen
from deberta_fast.op import flops
from deberta_fast.op.call import TENSORS

FUSED = [name for name in ON_CPU if name != "reference"]
FORWARD, BACKWARD = (getattr(torch.ops.deberta_fast, f"attention_{way}") for way in ("forward", "backward"))
TABLE = dict(position_buckets=4, max_relative_positions=8)


def pairs_one_by_one(call):
    """Counts all pairs, and the pairs whose distance has a row of its own."""
    batch, _, queries, _ = call.query.shape
    near, keys = 0, call.key.shape[2]
    table = call.table
    for i in range(queries):
        for j in range(keys):
            near += table.far_future < i + call.query_offset - j < table.far_past
    return batch * queries * keys, batch * near * call.has_positions


@pytest.mark.parametrize("case", [case for case in CASES if case.query_length <= 300], ids=lambda case: case.name)
def test_pairs(case):
    call = make_inputs(case, torch.float32)
    assert flops._pairs(call) == pairs_one_by_one(call)


def counted(function, **keywords):
    with FlopCounterMode(display=False, **keywords) as counter:
        function()
    return counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("backend", [None, *FUSED])
def test_forward_and_backward(backend):
    """Counts by hand are for 2 batch rows, 2 heads of size 8, 5 queries and 7 keys: 32 of the 35 pairs are near."""
    near = 2 * 32
    leaves = [torch.randn(shape, requires_grad=True) for shape in [(2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)]]
    tables = [torch.randn(2, 8, 8, requires_grad=True) for _ in range(2)]
    unit = 2 * 8 * 2  # two for each term of a product over the head size, for both heads
    run = lambda *tables: disentangled_attention(*leaves, *tables, **TABLE, backend=backend)
    assert counted(lambda: run()) == {FORWARD: unit * 2 * 70}
    assert counted(lambda: run(tables[0])) == {FORWARD: unit * (2 * 70 + near)}
    assert counted(lambda: run(*tables).sum().backward()) == {
        FORWARD: unit * (2 * 70 + 2 * near),
        BACKWARD: unit * (5 * 70 + 6 * near),
    }
    frozen = tables[0].detach()
    got = counted(lambda: run(frozen, tables[1]).sum().backward())
    assert got[BACKWARD] == unit * (5 * 70 + 5 * near)
    output = run(*tables)
    assert counted(output.sum().backward) == {BACKWARD: unit * (5 * 70 + 6 * near)}
    with torch.inference_mode():
        assert counted(lambda: run()) == {FORWARD: unit * 2 * 70}


def test_far_pairs_cost_what_plain_attention_does():
    inputs = make_inputs(Case("", 600, 600, batch=1, size=16), torch.float32)
    plain = flops.forward_flops(*inputs._replace(pos_key=None, pos_query=None), "eager")
    assert plain == 2 * 3 * 16 * 2 * 600 * 600
    assert 1.08 < flops.forward_flops(*inputs, "eager") / plain < 1.12  # slightly less than 63 of 600 keys are near


def test_packed_sequences_count_for_themselves():
    ends = torch.tensor([0, 4, 4, 10, 13], dtype=torch.int32)
    rows = torch.randn(13, 2, 8)
    run = lambda rows, ends: disentangled_attention_varlen(rows, rows, rows, cu_seqlens=ends, max_seqlen=6)
    assert counted(lambda: run(rows, ends)) == {FORWARD: 2 * 8 * 2 * 2 * (16 + 36 + 9)}
    most = {FORWARD: 2 * 8 * 2 * 2 * (36 + 36 + 1)}
    assert counted(lambda: run(rows.to("meta"), ends.to("meta"))) == most
    with FakeTensorMode() as mode:
        assert counted(lambda: run(mode.from_tensor(rows), mode.from_tensor(ends))) == most


def test_an_exported_program_is_counted():
    class Module(torch.nn.Module):
        def forward(self, x):
            return disentangled_attention(x, x, x)

    x = torch.randn(1, 2, 5, 8)
    program = torch.export.export(Module(), (x,)).module()
    assert counted(lambda: program(x)) == {FORWARD: 2 * 2 * 8 * 2 * 25}


def test_the_reference_is_counted_by_its_products():
    x = torch.randn(1, 2, 5, 8)
    got = counted(lambda: disentangled_attention(x, x, x, backend="reference"))
    assert sum(got.values()) == 2 * 2 * 8 * 2 * 25 and FORWARD not in got


def test_whatever_is_imported_first():
    """This package does not import the counter, which would import Triton."""
    use = """
x = torch.randn(1, 1, 3, 8)
with FlopCounterMode(display=False) as counter:
    deberta_fast.disentangled_attention(x, x, x)
assert counter.get_total_flops() == 2 * 8 * 2 * 9
"""
    counter = "from torch.utils.flop_counter import FlopCounterMode\n"
    package = "import sys, torch, deberta_fast\nassert 'torch.utils.flop_counter' not in sys.modules\n"
    for code in (package + counter + use, "import torch\n" + counter + "import deberta_fast\n" + use):
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_the_fields_of_a_call_come_first():
    call = make_inputs(BY_NAME["one-token"], torch.float32)
    assert len(call) > TENSORS and flops.forward_flops(*call, "cpu") == 2 * 3 * 64 * 2 * (2 + 2)
