"""LayerNorm of a sum in one pass: as precise as torch's two, and left to torch where it does not serve."""

import copy

import pytest
import torch
from torch import nn

from deberta_fast.models import add_norm
from deberta_fast.models.add_norm import add_and_norm
from deberta_fast.op.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.instruction_sets(), reason="the extension was not built")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def fused(monkeypatch):
    """The decisions for or against the one pass."""
    decisions, decide = [], add_norm._is_fused
    monkeypatch.setattr(add_norm, "_is_fused", lambda *call: decisions.append(decide(*call)) or decisions[-1])
    return decisions


def norm_of(size, dtype=torch.float32):
    norm = nn.LayerNorm(size, 1e-7)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype)


def two_passes(norm, x, residual):
    return norm(x + residual)


def results(call, norm, x, residual, gradient):
    """The output, and the gradients of x, the residual, weight and bias."""
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y = call(norm, x, residual)
    return [y.detach(), *torch.autograd.grad(y, [x, residual, norm.weight, norm.bias], gradient)]


@pytest.mark.parametrize("name", cpu.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 50, 768), (300, 100), (9, 17), (1, 3), (2, 1000)], ids=str)
def test_precision(fused, name, dtype, shape):
    torch.manual_seed(0)
    norm = norm_of(shape[-1], dtype)
    x, residual, gradient = (torch.randn(shape).to(dtype) for _ in range(3))
    exact = copy.deepcopy(norm).double()
    exacts = results(two_passes, exact, x.double(), residual.double(), gradient.double())
    torchs = results(two_passes, norm, x, residual, gradient)
    with cpu.using(name):
        ours = results(add_and_norm, norm, x, residual, gradient)
        with torch.no_grad():
            assert torch.equal(add_and_norm(norm, x, residual), ours[0])
    assert fused == [True, True]
    for got, eager, want in zip(ours, torchs, exacts, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        rounding = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (eager - want).abs().max() + rounding / 2
        assert (got - want).abs().mean() <= 2 * (eager - want).abs().mean() + rounding / 1000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-7, 0.0])
def test_rows_without_variance_and_without_numbers(fused, dtype, eps):
    torch.manual_seed(0)
    norm, x = norm_of(48, dtype), torch.randn(6, 48).to(dtype)
    norm.eps = eps
    residual = torch.randn(6, 48).to(dtype)
    x[0], residual[0] = 0, 0
    x[1] = -residual[1]
    x[2, 5], x[3, 5], x[4, 47] = float("nan"), float("inf"), -float("inf")
    gradient = torch.randn(6, 48).to(dtype)
    with torch.no_grad():
        got, want = add_and_norm(norm, x, residual), two_passes(norm, x, residual)
    assert torch.equal(got.isnan(), want.isnan()) and got[2:5].isnan().all()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2, equal_nan=True)
    if eps:
        assert torch.equal(got[:2], norm.bias.detach().expand(2, -1))
    for ours, torchs in zip(
        *(results(call, norm, x, residual, gradient) for call in (add_and_norm, two_passes)), strict=True
    ):
        assert torch.equal(ours.isnan(), torchs.isnan())
    assert all(fused)


def test_a_sum_that_overflows(fused):
    """The sum is rounded to the dtype before the norm, as that of an addition."""
    norm, x = norm_of(8), torch.full((2, 8), 3e38)
    with torch.no_grad():
        assert two_passes(norm, x, x).isnan().all() and add_and_norm(norm, x, x).isnan().all()
    assert fused == [True]


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
def test_gradient_of_one(fused, wanted):
    torch.manual_seed(0)
    norm = norm_of(20).requires_grad_(False)
    given = dict(x=torch.randn(5, 20), residual=torch.randn(5, 20))
    leaf = (given | dict(norm.named_parameters()))[wanted].requires_grad_()
    gradient = torch.randn(5, 20)
    ours, torchs = (torch.autograd.grad(f(norm, **given), leaf, gradient) for f in (add_and_norm, two_passes))
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)
    assert fused == [True]


def test_gradients_of_any_layout(fused):
    torch.manual_seed(0)
    norm, x = norm_of(20), torch.randn(4, 5, 20, requires_grad=True)

    def gradients(call):
        y = call(norm, x, x)  # one tensor twice
        expanded = torch.autograd.grad(y.sum(), [x, norm.weight], retain_graph=True)
        return *expanded, *torch.autograd.grad(y.transpose(1, 2), [x], torch.ones(4, 20, 5).cumsum(1))

    torch.testing.assert_close(gradients(add_and_norm), gradients(two_passes), rtol=1e-4, atol=1e-4)
    assert fused == [True]


def test_second_derivatives(fused):
    torch.manual_seed(0)
    norm, x, residual = norm_of(20), torch.randn(5, 20, requires_grad=True), torch.randn(5, 20, requires_grad=True)

    def second(call):
        leaves = [x, residual, norm.weight]
        first = torch.autograd.grad(call(norm, x, residual).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(second(add_and_norm), second(two_passes), rtol=1e-3, atol=1e-2)
    assert fused == [True]


def test_batches_of_gradients(fused):
    torch.manual_seed(0)
    norm, x, residual = norm_of(20), torch.randn(5, 20, requires_grad=True), torch.randn(5, 20)
    gradients = torch.randn(3, 5, 20)
    leaves = [x, norm.weight, norm.bias]
    ours, torchs = (
        torch.autograd.grad(call(norm, x, residual), leaves, gradients, is_grads_batched=True)
        for call in (add_and_norm, two_passes)
    )
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)
    assert fused == [True]


def test_threads_do_not_change_the_sums(fused):
    torch.manual_seed(0)
    norm, threads = norm_of(64), torch.get_num_threads()
    given = [torch.randn(1500, 64) for _ in range(3)]
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(add_and_norm, norm, *given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    assert all(fused)


class OtherNorm(nn.LayerNorm):
    pass


def hooked(norm):
    norm.register_forward_hook(lambda module, inputs, output: output + 1)
    return norm


@pytest.mark.parametrize(
    "other",
    [
        lambda norm: OtherNorm(20),
        lambda norm: nn.LayerNorm((4, 20)),
        lambda norm: nn.LayerNorm(20, bias=False),
        lambda norm: nn.LayerNorm(20, elementwise_affine=False),
        lambda norm: nn.Identity(),
        hooked,
    ],
    ids=["subclass", "two dimensions", "no bias", "no weight", "identity", "hook"],
)
def test_other_norms_run_themselves(fused, other):
    norm, x, residual = other(norm_of(20)), torch.randn(3, 4, 20), torch.randn(3, 4, 20)
    assert torch.equal(add_and_norm(norm, x, residual), two_passes(norm, x, residual))
    assert fused == [False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(fused, dtype):
    norm, x = norm_of(20, dtype), torch.randn(3, 20, dtype=dtype)
    assert torch.equal(add_and_norm(norm, x, x), two_passes(norm, x, x))
    assert fused == [False]


def test_mixed_dtypes_layouts_and_shapes(fused):
    torch.manual_seed(0)
    norm, x = norm_of(20), torch.randn(3, 4, 20)
    for other in (x.bfloat16(), x[:1], torch.randn(20, 4, 3).permute(2, 1, 0), x.as_subclass(nn.Buffer)):
        torch.testing.assert_close(add_and_norm(norm, x, other), two_passes(norm, x, other))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(add_and_norm(norm, x, x), two_passes(norm, x, x))
    assert fused == [False] * 5


def test_transforms_of_functions(fused):
    torch.manual_seed(0)
    norm, x, residual, tangent = norm_of(20), torch.randn(3, 20), torch.randn(3, 20), torch.randn(3, 20)
    got = torch.func.jvp(lambda x: add_and_norm(norm, x, residual), (x,), (tangent,))
    torch.testing.assert_close(got, torch.func.jvp(lambda x: two_passes(norm, x, residual), (x,), (tangent,)))
    got = torch.func.vmap(lambda x: add_and_norm(norm, x, residual[0]))(x)
    torch.testing.assert_close(got, two_passes(norm, x, residual[0]))
    compiled = torch.compile(lambda x: add_and_norm(norm, x, residual), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), two_passes(norm, x, residual))
    assert not any(fused)


def test_no_rows(fused):
    norm, x = norm_of(20), torch.randn(0, 20, requires_grad=True)
    y = add_and_norm(norm, x, x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 20) and not norm.weight.grad.any() and not norm.bias.grad.any()
    assert fused == [True]


def test_the_operator_refuses_what_does_not_fit():
    x, w = torch.zeros(3, 20), torch.zeros(20)
    call = torch.ops.deberta_fast.add_norm
    for wrong in (
        (x.clone(), None, None, x, x[:2], w, w, 1e-7),
        (x.clone(), None, None, x, x, w, w[:19], 1e-7),
        (x.clone(), None, None, x, x, w[:19], w[:19], 1e-7),
        (x.clone(), None, torch.zeros(5), x, x, w, w, 1e-7),
        (x.clone(), None, None, x, x.bfloat16(), w, w, 1e-7),
        (x.clone(), None, None, x, torch.zeros(20, 3).T, w, w, 1e-7),
    ):
        with pytest.raises(RuntimeError, match="add_norm"):
            call(*wrong)
