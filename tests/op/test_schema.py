"""The registered operators: schema, fake kernels, torch.compile without breaks and without a compile per length."""

import pytest
import torch
from cases import BY_NAME, Case, make_inputs
from torch._dynamo.testing import CompileCounterWithBackend

from deberta_fast import disentangled_attention, disentangled_attention_varlen
from deberta_fast.op import backends

FORWARD, BACKWARD = (getattr(torch.ops.deberta_fast, f"attention_{way}").default for way in ("forward", "backward"))
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    "name", ["ragged-L129-D64", "holes-L200", "ragged-L129-D64-neither", "fused-qkv-views-L129-D24"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(name, dtype):
    inputs = make_inputs(BY_NAME[name], dtype)
    torch.library.opcheck(FORWARD, (*inputs, "eager"), test_utils=CHECKS)
    output, lse = backends.forward(inputs, "eager")
    torch.library.opcheck(BACKWARD, (output, lse, output, lse, *inputs, "eager", [True] * 5), test_utils=CHECKS)


def test_opcheck_packed():
    inputs = make_inputs(Case("packed", 60, 60, batch=1, size=16), torch.float32)
    inputs = inputs._replace(cu_seqlens=torch.tensor([0, 20, 60], dtype=torch.int32), max_seqlen=60)
    torch.library.opcheck(FORWARD, (*inputs, "eager"), test_utils=CHECKS)
    output, lse = backends.forward(inputs, "eager")
    torch.library.opcheck(BACKWARD, (output, lse, output, lse, *inputs, "eager", [True] * 5), test_utils=CHECKS)


def leaves(length, batch=2):
    inputs = make_inputs(Case("x", length, length, batch=batch, size=16), torch.float32)
    return [x.requires_grad_() for x in inputs[:5]], torch.arange(length) < torch.tensor([[length], [length - 3]])


def test_compile_forward_and_backward_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attention(query, key, value, pos_key, pos_query, mask):
        return disentangled_attention(
            query * 1.5, key, value, pos_key, pos_query,
            position_buckets=16, max_relative_positions=32, attention_mask=mask, return_lse=True,
        )  # fmt: skip

    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    frames = []
    for length in (50, 61, 83, 120):
        tensors, mask = leaves(length)
        (got, got_lse), (want, want_lse) = compiled(*tensors, mask), attention(*tensors, mask)
        assert torch.equal(got, want) and torch.equal(got_lse, want_lse)
        for g, w in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (got, want))):
            torch.testing.assert_close(g, w)
        frames.append(counter.frame_count)
    assert frames[1:] == [2, 2, 2], frames  # one for the first length, one for all others


def test_compile_packed_and_dropout():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def attention(query, key, value, ends, longest):
        return disentangled_attention_varlen(query, key, value, cu_seqlens=ends, max_seqlen=longest, dropout_p=0.1)

    for length in (40, 56, 72):
        query, key, value = torch.randn(3, length, 2, 16, requires_grad=True)
        ends = torch.tensor([0, 11, length], dtype=torch.int32)
        attention(query, key, value, ends, length).sum().backward()
    assert counter.frame_count == 2


def test_compiled_checks_of_values_raise():
    torch._dynamo.reset()
    attention = torch.compile(disentangled_attention_varlen, backend="aot_eager", fullgraph=True)
    query, key, value = torch.randn(3, 10, 2, 16)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        attention(query, key, value, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32), max_seqlen=10)


def test_inductor():
    torch._dynamo.reset()
    tensors, mask = leaves(40)

    def attention(*tensors):
        return disentangled_attention(
            *tensors, position_buckets=16, max_relative_positions=32, attention_mask=mask
        ).square()

    got, want = torch.compile(attention, fullgraph=True)(*tensors), attention(*tensors)
    torch.testing.assert_close(got, want)
    for g, w in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (got, want))):
        torch.testing.assert_close(g, w)
