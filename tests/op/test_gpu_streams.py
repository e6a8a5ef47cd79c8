"""On a CUDA device: streams, devices, CUDA graphs and compilation. ``make gpu``."""

import sys

import pytest
import torch
from cases import Case, make_inputs
from gpu import (  # noqa: F401
    BACKENDS,
    DEVICE,
    FUSED,
    TABLE,
    by_backend,
    by_fused_backend,
    normal,
    on_device,
    pytestmark,
    usual_dtype,
)
from torch._dynamo.testing import CompileCounterWithBackend

from deberta_fast import disentangled_attention, disentangled_attention_varlen


@by_fused_backend
def test_runs_in_the_stream_that_is_current(backend):
    """Its input is computed late in that stream, so a kernel in another stream would read the old contents."""
    leaves = list(make_inputs(on_device("ragged-L129-D64"), torch.bfloat16)[:5])
    gradient, late = (
        normal(*leaves[0].shape, dtype=torch.bfloat16),
        normal(*leaves[0].shape, dtype=torch.bfloat16, seed=1),
    )

    def run(query):
        query = query.detach().requires_grad_()
        output = disentangled_attention(query, *leaves[1:], **TABLE, backend=backend)
        return [output.detach(), *torch.autograd.grad(output, query, gradient)]

    expected, query = run(late), leaves[0].clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        query.copy_(late)
        got = run(query)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@by_fused_backend
def test_runs_where_its_tensors_are(backend):
    """The current device does not matter."""
    leaves = [x.requires_grad_() for x in make_inputs(on_device("holes-L200"), torch.bfloat16)[:5]]
    mask = make_inputs(on_device("holes-L200"), torch.bfloat16).mask[:, 0, 0]

    def run(leaves, mask):
        output = disentangled_attention(*leaves, **TABLE, attention_mask=mask, backend=backend)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]

    expected, other = run(leaves, mask), torch.device(DEVICE, 1)
    assert torch.cuda.current_device() == 0
    got = run([x.detach().to(other).requires_grad_() for x in leaves], mask.to(other))
    assert torch.cuda.current_device() == 0 and all(x.device == other for x in got)
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, expected))


def captured(run):
    """Returns a CUDA graph of ``run`` and its results, after some runs that compile and allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
@by_fused_backend
def test_cuda_graph(backend, layout, backward):
    """The graph is replayed with other contents, another mask and other sequences, since it stores none of these."""
    total = 300
    if layout == "dense":
        leaves = [normal(2, 3, total, 64, dtype=torch.bfloat16, seed=n) for n in range(3)]
        index = torch.ones(2, total, dtype=torch.bool, device=DEVICE)
        other_index = torch.rand(2, total, device=DEVICE) > 0.4
        attention = lambda: disentangled_attention(*leaves, **TABLE, attention_mask=index, backend=backend)
    else:
        leaves = [normal(total, 3, 64, dtype=torch.bfloat16, seed=n) for n in range(3)]
        index = torch.tensor([0, 100, 101, 101, 300], dtype=torch.int32, device=DEVICE)
        other_index = torch.tensor([0, 7, 7, 290, 300], dtype=torch.int32, device=DEVICE)
        attention = lambda: disentangled_attention_varlen(
            *leaves, **TABLE, cu_seqlens=index, max_seqlen=300, backend=backend
        )
    leaves += [normal(3, 32, 64, dtype=torch.bfloat16, seed=n) for n in (3, 4)]
    gradient = normal(*leaves[0].shape, dtype=torch.bfloat16, seed=5)
    for x in leaves:
        x.requires_grad_(backward)

    def run():
        output = attention()
        return [output.detach(), *(torch.autograd.grad(output, leaves, gradient) if backward else ())]

    graph, results = captured(run)
    with torch.no_grad():
        for n, x in enumerate((*leaves, gradient)):
            x.copy_(normal(*x.shape, dtype=x.dtype, seed=10 + n))
        index.copy_(other_index)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(results, run(), strict=True))


@by_fused_backend
def test_cuda_graph_draws_a_new_dropout_mask_a_replay(backend):
    query, key, value = (normal(2, 3, 100, 64, dtype=torch.bfloat16, seed=n) for n in range(3))
    graph, output = captured(lambda: disentangled_attention(query, key, value, dropout_p=0.5, backend=backend))
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(output.clone())
    assert all(torch.isfinite(x).all() for x in replays) and not torch.equal(*replays)


@by_backend
def test_compiles_once_for_all_lengths(backend):
    torch._dynamo.reset()
    counter, dtype = CompileCounterWithBackend("inductor"), usual_dtype(backend)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4

    def attention(query, key, value, pos_key, pos_query, mask):
        output = disentangled_attention(
            query * 1.5, key, value, pos_key, pos_query, **TABLE, attention_mask=mask, backend=backend
        )
        return output * 2

    compiled, frames = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True), []
    for length in (50, 61, 83, 120, 512):
        inputs = make_inputs(on_device(Case("x", length, length, mask="right")), dtype)
        leaves = [x.requires_grad_() for x in inputs[:5]]
        mask = inputs.mask[:, 0, 0]
        got, want = compiled(*leaves, mask), attention(*leaves, mask)
        torch.testing.assert_close(got, want)
        for g, w in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (got, want))):
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * float(w.abs().max()))
        frames.append(counter.frame_count)
    assert frames[-1] <= 2 and len(set(frames[1:])) == 1, frames


def compiled_kernels(backend):
    """Counts how often Triton has compiled each kernel in a backend's modules."""
    from triton.runtime.jit import JITFunction, KernelInterface

    kernels = set()
    for name, module in list(sys.modules.items()):
        if name.startswith(f"deberta_fast.op.backends.{backend}"):
            for value in vars(module).values():
                while isinstance(value, KernelInterface) and not isinstance(value, JITFunction):
                    value = value.fn  # autotuned, heuristics
                if isinstance(value, JITFunction):
                    kernels.add(value)
    assert kernels
    return {kernel.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels}


@pytest.mark.parametrize("backend", [name for name in FUSED if name == "triton"])
def test_no_compilation_a_length(backend):
    tables = [normal(2, 512, 64, dtype=torch.bfloat16, seed=n).requires_grad_() for n in range(2)]

    def run(length, batch):
        query, key, value = (normal(batch, length, 2, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        disentangled_attention(query.requires_grad_(), key, value, *tables, backend=backend).sum().backward()

    # The shortest and longest lengths, with and without numbers that Triton compiles for separately: 1 and multiples
    # of 16.
    for length in (100, 101, 112, 128, 255, 256, 512, 688, 700):
        for batch in (1, 2, 3, 16):
            run(length, batch)
    before = compiled_kernels(backend)
    for length in range(100, 701, 37):
        for batch in range(1, 6):
            run(length, batch)
    assert compiled_kernels(backend) == before
