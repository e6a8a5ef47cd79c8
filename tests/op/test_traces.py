"""torch.jit.trace, which records a call, and meta and fake tensors, which ask only for shapes."""

import io
import warnings

import pytest
import torch
from cases import ON_CPU
from torch._subclasses.fake_tensor import FakeTensorMode

from deberta_fast import disentangled_attention, disentangled_attention_varlen
from deberta_fast.op import backends, relative_position
from deberta_fast.op.api import disentangled_attention_with_probabilities

TABLE = dict(position_buckets=4, max_relative_positions=8)
ENDS = torch.tensor([0, 4, 6], dtype=torch.int32)


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """The reasons for which the reference ran, in this test only."""
    reasons = set()
    monkeypatch.setattr(backends, "_told", reasons)
    return reasons


class Attention(torch.nn.Module):
    """Computes attention of heads (B, 2, L, 8), which are queries, keys and values at once."""

    def __init__(self, **keywords):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.pos_key, self.pos_query = (torch.nn.Parameter(torch.randn(2, 8, 8, generator=random)) for _ in range(2))
        self.keywords = keywords

    def forward(self, heads, mask):
        return disentangled_attention(
            heads, heads, heads, self.pos_key, self.pos_query, **TABLE, attention_mask=mask, **self.keywords
        )


def given(batch, length):
    random = torch.Generator().manual_seed(length)
    heads = torch.randn(batch, 2, length, 8, generator=random)
    return heads, torch.rand(batch, length, generator=random) > 0.3


def saved_and_loaded(module, arguments, **keywords):
    traced, file = torch.jit.trace(module, arguments, **keywords), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("warm", [False, True], ids=["first-call", "later-call"])
def test_traced_saved_and_loaded(warm, return_lse):
    """One trace serves other batches and lengths too, and later calls outside the trace are unchanged."""
    module = Attention(return_lse=return_lse)
    relative_position._on_devices.clear()
    if warm:
        module(*given(2, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("always", category=torch.jit.TracerWarning)
        loaded = saved_and_loaded(module, given(2, 5))
    [warning] = caught
    assert "only 'reference' can be traced by torch.jit" in str(warning.message)
    for shape in ((2, 5), (1, 1), (3, 23)):
        torch.testing.assert_close(loaded(*given(*shape)), module(*given(*shape)))
    heads, mask = given(2, 7)
    parameters = list(module.parameters())
    loss = lambda run: (output[0] if isinstance(output := run(heads, mask), tuple) else output).square().sum()
    expected = torch.autograd.grad(loss(module), parameters)
    for got, want in zip(torch.autograd.grad(loss(loaded), list(loaded.parameters())), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:Trace had nondeterministic")
def test_dropout_is_drawn_anew_in_a_trace():
    loaded = saved_and_loaded(Attention(dropout_p=0.4), given(2, 5), check_trace=False)
    heads, mask = given(3, 40)
    first, second = loaded(heads, mask), loaded(heads, mask)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    again = loaded(heads, mask)
    torch.manual_seed(5)
    torch.testing.assert_close(Attention(dropout_p=0.4)(heads, mask), again)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
def test_a_named_backend_is_not_traced(backend):
    with pytest.raises(RuntimeError, match=f"{backend!r} cannot serve this call: only 'reference' can be traced"):
        torch.jit.trace(Attention(backend=backend), given(2, 5))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_the_reference_is_traced_without_a_warning(told):
    torch.jit.trace(Attention(backend="reference"), given(2, 5))
    assert not told


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", [None, "reference"])
def test_packed_sequences_are_not_traced(backend):
    """Their lengths would become constants."""
    run = lambda rows, ends: disentangled_attention_varlen(
        rows, rows, rows, cu_seqlens=ends, max_seqlen=4, backend=backend
    )
    with pytest.raises(RuntimeError, match="would keep their lengths as constants"):
        torch.jit.trace(run, (torch.randn(6, 2, 8), ENDS))


# Only shapes


def empty(device):
    shapes = [(3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), (2, 8, 8), (2, 8, 8)]
    return [torch.empty(shape, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", [None, "eager", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_meta(backend, autocast):
    leaves = empty("meta")
    mask = torch.empty(3, 7, dtype=torch.bool, device="meta")
    with torch.autocast("cpu", enabled=autocast):
        output, lse = disentangled_attention(
            *leaves, **TABLE, attention_mask=mask, dropout_p=0.1, return_lse=True, backend=backend
        )
        assert output.is_meta and output.shape == (3, 2, 5, 8) and output.dtype == torch.float32
        assert lse.is_meta and lse.shape == (3, 2, 5)
        output.sum().backward()
    assert all(x.grad.is_meta and x.grad.shape == x.shape for x in leaves)
    probabilities = disentangled_attention_with_probabilities(*leaves, **TABLE)[1]
    assert probabilities.is_meta and probabilities.shape == (3, 2, 5, 7)


def test_meta_packed():
    rows, ends = torch.empty(6, 2, 8, device="meta", requires_grad=True), ENDS.to("meta")
    output = disentangled_attention_varlen(rows, rows, rows, cu_seqlens=ends, max_seqlen=4)
    output.sum().backward()
    assert output.shape == rows.shape == rows.grad.shape
    with pytest.raises(RuntimeError, match="need a cu_seqlens with values"):
        disentangled_attention_varlen(rows, rows, rows, cu_seqlens=ends, max_seqlen=4, backend="reference")


@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_fake(backend):
    with FakeTensorMode():
        leaves = empty("cpu")
        output, lse = disentangled_attention(*leaves, **TABLE, return_lse=True, backend=backend)
        output.sum().backward()
        assert output.shape == (3, 2, 5, 8) and lse.shape == (3, 2, 5)
        assert all(x.grad.shape == x.shape for x in leaves)
