"""Projections run in oneDNN where it is faster; a module that does more than a product runs itself."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from deberta_fast.models import onednn_linear as projection
from deberta_fast.models.activation import activation, gelu_of
from deberta_fast.models.onednn_linear import project

is_faster = projection._is_faster


@pytest.fixture(autouse=True)
def fast_onednn(monkeypatch):
    """Each test runs as on a processor where oneDNN is faster for every product, however small."""
    if not projection._supports(torch.float32):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(projection, "_is_faster", lambda *call: True)
    monkeypatch.setattr(projection, "_shares", {})


@pytest.fixture
def by_onednn(monkeypatch):
    """The decisions of ``project`` for or against oneDNN, one per product."""
    decisions, decide = [], projection._by_onednn
    monkeypatch.setattr(projection, "_by_onednn", lambda *call: decisions.append(decide(*call)) or decisions[-1])
    return decisions


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (3, 20), (2, 0)])
def test_equals_the_module(by_onednn, bias, shape):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 40, bias), torch.randn(*shape, 48)
    with torch.no_grad():
        torch.testing.assert_close(project(linear, x), linear(x), rtol=1e-5, atol=1e-5)
        views = torch.randn(48, 30, 2).permute(2, 1, 0)[:, ::3]
        torch.testing.assert_close(project(linear, views), linear(views), rtol=1e-5, atol=1e-5)
    assert by_onednn == [0 not in shape, True]


def test_deep_products_are_as_precise_as_torchs(by_onednn):
    torch.manual_seed(0)
    linear, x = nn.Linear(3072, 40), torch.randn(300, 3072, requires_grad=True)
    gradient = torch.randn(300, 40)
    exact = copy.deepcopy(linear).double()
    found = []
    for call, given in ((linear, x), (lambda x: project(linear, x), x), (exact, x.double().detach().requires_grad_())):
        y = call(given)
        weight = exact.weight if call is exact else linear.weight
        found.append([y, *torch.autograd.grad(y, [given, weight], gradient.to(y))])
    for torchs, ours, want in zip(*found, strict=True):
        assert (ours - want).abs().mean() <= 2 * (torchs - want).abs().mean()
    assert by_onednn == [True] * 3


def test_in_inference_mode(by_onednn):
    linear = nn.Linear(16, 16)
    with torch.inference_mode():
        project(linear, torch.randn(9, 16))
    assert by_onednn == [True]


class OtherLinear(nn.Linear):
    pass


def hooked(linear):
    linear.register_forward_hook(lambda *_: None)
    return linear


def hooked_before(linear):
    linear.register_forward_pre_hook(lambda *_: None)
    return linear


def replaced(linear):
    linear.forward = lambda x: x
    return linear


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


class Quantised(torch.Tensor):
    """Weights of the kinds that libraries put into a Linear."""


def of_quantised(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    return linear


@pytest.mark.parametrize(
    "other",
    [
        of_quantised,
        lambda linear: OtherLinear(16, 16),
        lambda linear: nn.Sequential(linear),
        hooked,
        hooked_before,
        replaced,
        parametrized,
        lambda linear: linear.double(),
    ],
    ids=["weight", "subclass", "wrapper", "hook", "pre-hook", "forward", "parametrization", "float64"],
)
def test_what_is_more_than_a_product_runs_itself(by_onednn, other):
    linear = other(nn.Linear(16, 16))
    x = torch.randn(9, 16, dtype=next(linear.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(project(linear, x), linear(x))
    assert not any(by_onednn)


def test_autocast_and_hooks_keep_torchs_choice(by_onednn):
    linear, x = nn.Linear(16, 16), torch.randn(9, 16)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert project(linear, x).dtype == torch.bfloat16
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        project(linear, x)
        handle.remove()
        assert not any(by_onednn)
        project(linear, x)
    assert by_onednn[-1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9,), (3, 20)])
def test_gradients(by_onednn, bias, shape):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 40, bias), torch.randn(*shape, 48, requires_grad=True)
    weights, gradient = list(linear.parameters()), torch.randn(*shape, 40)
    expected = torch.autograd.grad(linear(x), [x, *weights], gradient)
    got = torch.autograd.grad(project(linear, x), [x, *weights], gradient)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert by_onednn == [True] * 3  # the product, and the gradients of input and weight


def test_gradients_of_some(by_onednn):
    linear, x = nn.Linear(16, 16), torch.randn(9, 16)
    linear.bias.requires_grad_(False)
    project(linear, x).sum().backward()
    assert linear.weight.grad is not None and linear.bias.grad is None and by_onednn == [True] * 2
    linear.requires_grad_(False)
    assert not project(linear, x).requires_grad
    assert project(linear, x.requires_grad_()).requires_grad


def test_second_derivatives(by_onednn):
    linear, x = nn.Linear(12, 9), torch.randn(10, 12, requires_grad=True)

    def second(call):
        gradients = torch.autograd.grad(call(x).square().sum(), [x, linear.weight], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), [x, linear.weight, linear.bias])

    torch.testing.assert_close(second(lambda x: project(linear, x)), second(linear), rtol=1e-4, atol=1e-3)


def test_under_transforms_of_functions(by_onednn):
    linear, x = nn.Linear(16, 16), torch.randn(9, 16)
    got = torch.func.vmap(torch.func.grad(lambda row: project(linear, row.expand(9, -1)).sum()))(x)
    torch.testing.assert_close(got, 9 * linear.weight.sum(0).expand(9, -1))
    assert not any(by_onednn)


def agrees(linear, x):
    """Output and gradients equal those of the module; so does the output under ``torch.no_grad``."""
    leaves = [x.requires_grad_(), *linear.parameters()]
    got, expected = project(linear, x), linear(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(project(linear, x), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bias",
    [lambda: torch.randn(80)[::2], lambda: torch.randn(1).expand(40), lambda: torch.randn(41)[1:]],
    ids=["strided", "expanded", "offset"],
)
def test_biases_of_any_stride(by_onednn, bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 40)
    linear.bias = nn.Parameter(bias())
    agrees(linear, torch.randn(9, 48))
    assert all(by_onednn)


@pytest.mark.parametrize("inputs", [0, 1, 1023, 1024, 1025, 2048])
def test_products_of_any_depth(by_onednn, inputs):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, 7) if inputs else nn.Linear(1, 7)
    linear.weight = nn.Parameter(torch.randn(7, inputs) / max(inputs, 1) ** 0.5)
    agrees(linear, torch.randn(9, inputs))
    assert by_onednn[0] == (inputs > 0)


def test_no_outputs(by_onednn):
    linear = nn.Linear(16, 1, bias=False)
    linear.weight = nn.Parameter(torch.randn(0, 16))
    agrees(linear, torch.randn(9, 16))


@pytest.mark.parametrize("given, wanted", [(1024, 2048), (2048, 1024), (1024, 3072), (16, 17), (1, 16), (0, 16)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_wrong_depth_is_refused(given, wanted, grad):
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="cannot be multiplied"):
        project(nn.Linear(wanted, 7), torch.randn(9, given))


@pytest.mark.parametrize("shape", [(1,), (9, 1), ()], ids=str)
def test_a_bias_that_torch_broadcasts(shape):
    x, weight, bias = torch.randn(9, 16), torch.randn(7, 16), torch.randn(shape)
    torch.testing.assert_close(projection.product(x, weight, bias), nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("bias", [torch.zeros(6), torch.zeros(8), torch.zeros(7).double()], ids=["6", "8", "float64"])
def test_a_wrong_bias_is_refused(bias):
    with torch.no_grad(), pytest.raises(RuntimeError):
        projection.product(torch.randn(9, 16), torch.randn(7, 16), bias)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("of", ["x", "weight", "bias"])
def test_forward_mode_derivatives(grad, of):
    torch.manual_seed(0)
    given = dict(x=torch.randn(9, 16), weight=torch.randn(7, 16), bias=torch.randn(7))
    tangent = torch.randn_like(given[of])

    def derivative(function):
        with torch.set_grad_enabled(grad), torch.autograd.forward_ad.dual_level():
            dual = given | {of: torch.autograd.forward_ad.make_dual(given[of], tangent)}
            return torch.autograd.forward_ad.unpack_dual(function(*dual.values())).tangent

    torch.testing.assert_close(derivative(projection.product), derivative(nn.functional.linear))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_switched_off(by_onednn):
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        project(nn.Linear(16, 16), torch.randn(9, 16))
    assert by_onednn == [False]


def test_compiles_in_one_graph():
    linear, x = nn.Linear(16, 16), torch.randn(9, 16)
    compiled = torch.compile(lambda x: project(linear, x), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), linear(x))


def test_copies_and_casts_are_seen(by_onednn):
    """Nothing is kept from call to call."""
    linear, x = nn.Linear(16, 16), torch.randn(9, 16)
    with torch.no_grad():
        project(linear, x)
        other = copy.deepcopy(linear)
        other.weight.mul_(2)
        torch.testing.assert_close(project(other, x), other(x))
        linear.weight.zero_()
        torch.testing.assert_close(project(linear, x), linear.bias.expand(9, -1))
    assert all(by_onednn)


def half_or_skip(dtype):
    if not projection._supports(dtype):
        pytest.skip(f"oneDNN has no products in {dtype} on this processor")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [48, 2048])
def test_half_precision(by_onednn, dtype, inputs):
    half_or_skip(dtype)
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, 40, dtype=dtype), torch.randn(3, 20, inputs, dtype=dtype, requires_grad=True)
    exact, given = copy.deepcopy(linear).double(), x.detach().double().requires_grad_()
    gradient = torch.randn(3, 20, 40, dtype=dtype)
    found = []
    for call, leaf in ((linear, linear), (lambda x: project(linear, x), linear), (exact, exact)):
        y = call(given if call is exact else x)
        leaves = [given if call is exact else x, *leaf.parameters()]
        found.append([y, *torch.autograd.grad(y, leaves, gradient.to(y))])
    for torchs, ours, want in zip(*found, strict=True):
        assert ours.dtype == dtype
        assert (ours - want).abs().mean() <= 2 * (torchs - want).abs().mean() + 1e-12
        assert (ours - want).abs().max() <= 2 * (torchs - want).abs().max() + 1e-12
    assert by_onednn == [True, False, False]  # without a bias, torch's product is oneDNN's


@pytest.mark.parametrize("name", ["gelu", "gelu_new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [768, 1100])
def test_gelu_in_the_product(monkeypatch, name, dtype, inputs):
    """oneDNN applies the GELU if no gradients are wanted, as precisely as torch, which rounds the product first."""
    half_or_skip(dtype)
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, 80, dtype=dtype), 2 * torch.randn(100, inputs, dtype=dtype)
    act = activation(name)
    want = act(copy.deepcopy(linear).double()(x.double()))
    torchs = act(linear(x))
    fused = dtype != torch.float32 or inputs <= projection.DEEPEST  # a deep product is a sum of products
    with monkeypatch.context() as patched:
        if fused:
            patched.setattr(projection, "F", None)
        with torch.no_grad():
            ours = project(linear, x, act)
    assert (ours - want).abs().mean() <= 2 * (torchs - want).abs().mean()
    assert (ours - want).abs().max() <= 2 * (torchs - want).abs().max() + torch.finfo(dtype).eps
    torch.testing.assert_close(project(linear, x, act).detach(), torchs.detach(), rtol=1e-2, atol=1e-2)


def test_gelu_of_no_number():
    given = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 100.0, -100.0])
    got = projection.product(torch.ones(1, 1), given[:, None], None, "none")[0]
    torch.testing.assert_close(got, F.gelu(given), equal_nan=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_through_gelu(by_onednn, frozen):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 40).requires_grad_(not frozen), torch.randn(9, 48)
    got, expected = project(linear, x, F.gelu), F.gelu(linear(x))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(by_onednn) and got.requires_grad is not frozen
    if not frozen:
        grads = [torch.autograd.grad(y.square().sum(), list(linear.parameters())) for y in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)


def test_other_activations_run_themselves():
    linear, x, calls = nn.Linear(16, 16), torch.randn(9, 16), []
    with torch.no_grad():
        torch.testing.assert_close(project(linear, x, torch.tanh), linear(x).tanh())
        act = nn.GELU()
        act.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(project(linear, x, act), act(linear(x)))
        hooked_linear = hooked(nn.Linear(16, 16))
        torch.testing.assert_close(project(hooked_linear, x, F.gelu), F.gelu(hooked_linear(x)))
    assert len(calls) == 2


def test_the_activations_that_are_gelu():
    activations = pytest.importorskip("transformers.activations")
    assert gelu_of(activation("gelu")) == gelu_of(activations.ACT2FN["gelu"]) == "none"
    assert gelu_of(activation("gelu_new")) == gelu_of(activations.ACT2FN["gelu_pytorch_tanh"]) == "tanh"
    assert gelu_of(copy.deepcopy(activation("gelu_new"))) == "tanh"
    for name in ("gelu_python", "gelu_10", "gelu_new", "gelu_accurate", "quick_gelu", "relu"):
        assert gelu_of(activations.ACT2FN[name]) is None, name
    changed = activations.GELUActivation()
    changed.forward = lambda x: x
    others = (
        changed,
        hooked(activations.GELUActivation()),
        F.relu,
        functools.partial(F.gelu),
        nn.GELU(),
    )
    assert [gelu_of(other) for other in others] == [None] * len(others)


class Clock:
    """Makes one of two alternating calls take longer, by torch's clock in the module."""

    def __init__(self, *seconds):
        self.seconds, self.calls, self.now = seconds, 0, 0.0

    def perf_counter(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += self.seconds[(self.calls // 2 - 1) % 2]
        return self.now


@pytest.fixture
def measured(monkeypatch):
    """Decides by measurement again, with a clock that shows a call by torch and one by oneDNN these seconds."""
    monkeypatch.setattr(projection, "SMALLEST", 0)

    def with_clock(*seconds):
        monkeypatch.setattr(projection, "_is_faster", is_faster)
        monkeypatch.setattr(projection, "time", clock := Clock(*seconds))
        return clock

    return with_clock


@pytest.mark.parametrize("torchs, onednns, chosen", [(2.0, 1.0, True), (1.0, 2.0, False)])
def test_the_faster_one_is_chosen(by_onednn, measured, torchs, onednns, chosen):
    measured(torchs, onednns)
    with torch.no_grad():
        linear, x = nn.Linear(16, 16), torch.randn(9, 16)
        torch.testing.assert_close(project(linear, x), linear(x))
    assert by_onednn == [chosen]


@pytest.mark.parametrize("share, chosen", [(0.97, [True, False]), (0.9, [True, True]), (1.01, [False, False])])
def test_half_precision_with_gradients_has_to_be_worth_it(by_onednn, measured, share, chosen):
    half_or_skip(torch.bfloat16)
    measured(1.0, share)
    linear, x = nn.Linear(16, 16, dtype=torch.bfloat16), torch.randn(9, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        project(linear, x)
    project(linear, x)
    assert by_onednn == chosen


def test_a_kind_is_measured_once(measured):
    clock = measured(2.0, 1.0)
    linear, other = nn.Linear(16, 16), nn.Linear(17, 31)

    def measures(*call):
        before = clock.calls
        with torch.no_grad():
            project(*call)
        return clock.calls > before

    assert measures(linear, torch.randn(9, 16))
    assert not measures(linear, torch.randn(15, 16)) and not measures(nn.Linear(31, 17), torch.randn(8, 31)[:, :31])
    assert not measures(other, torch.randn(9, 17))
    assert measures(linear, torch.randn(16, 16)) and measures(linear, torch.randn(9, 16), F.gelu)
    assert measures(nn.Linear(32, 16), torch.randn(9, 32)) and measures(nn.Linear(16, 16, False), torch.randn(9, 16))
    assert measures(linear, torch.randn(200, 16)) and not measures(linear, torch.randn(5000, 16))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert measures(linear, torch.randn(9, 16))
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_measured(by_onednn, measured, monkeypatch):
    """Deterministic algorithms, small products and programs that count operators keep torch's choice."""
    clock = measured(2.0, 1.0)
    linear, x = nn.Linear(16, 16), torch.randn(9, 16)
    with torch.no_grad():
        torch.use_deterministic_algorithms(True)
        try:
            project(linear, x)
        finally:
            torch.use_deterministic_algorithms(False)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
            projection.product(x, linear.weight, linear.bias)
        assert counted.get_total_flops() == 2 * 9 * 16 * 16
        monkeypatch.setattr(projection, "SMALLEST", 9 * 16 * 16 + 1)
        project(linear, x)
    assert by_onednn == [False] * 3 and clock.calls == 0
