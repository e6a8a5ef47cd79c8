"""Second derivatives, forward mode and torch.func, which kernels lack, give right values or an error, never zeros."""

import warnings

import pytest
import torch
from cases import ON_CPU
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp, jacobian, vhp
from torch.func import functional_call, jacfwd, jacrev, jvp, vjp, vmap

from deberta_fast import disentangled_attention, disentangled_attention_varlen
from deberta_fast.op import backends, relative_position

TABLE = dict(position_buckets=4, max_relative_positions=8)
FUSED = [name for name in ON_CPU if name != "reference"]
NAMES = ("query", "key", "value", "pos_key", "pos_query")
ENDS = torch.tensor([0, 4, 4, 6], dtype=torch.int32)
each_backend = pytest.mark.parametrize("backend", [None, *ON_CPU])
each_way = pytest.mark.parametrize("way", ["dense", "masked", "dropout", "packed", "lse"])


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """The reasons for which the reference ran, in this test only."""
    reasons = set()
    monkeypatch.setattr(backends, "_told", reasons)
    return reasons


def tensors(dtype=torch.float32, length=6, size=8):
    random = torch.Generator().manual_seed(0)
    shapes = [(1, 2, length, size)] * 3 + [(2, 8, size)] * 2
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def attention(way, backend):
    """Returns a function of the five tensors in dense layout, even if the call is packed."""

    def run(query, key, value, *tables):
        torch.manual_seed(1)
        if way == "packed":
            rows = [x[0].transpose(0, 1) for x in (query, key, value)]
            return disentangled_attention_varlen(
                *rows, *tables, **TABLE, cu_seqlens=ENDS, max_seqlen=4, backend=backend
            ).transpose(0, 1)[None]
        mask = torch.arange(key.shape[-2])[None] != 2 if way == "masked" else None
        keywords = dict(attention_mask=mask, dropout_p=0.3 if way == "dropout" else 0.0, return_lse=way == "lse")
        result = disentangled_attention(query, key, value, *tables, **TABLE, **keywords, backend=backend)
        return result[0] + result[1][..., None] if way == "lse" else result

    return run


def loss(way, backend):
    return lambda *x: (run := attention(way, backend))(*x).pow(2).sum() + run(*x).sum()


def assert_close(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert e.abs().max() > 0.01
        torch.testing.assert_close(g, e.to(g), rtol=1e-4, atol=2e-5 * max(1.0, float(e.abs().max())))


# Second derivatives of what a backend computed


@each_backend
@each_way
def test_hessian_vector_products(way, backend, told):
    random = torch.Generator().manual_seed(3)
    vectors = tuple(torch.randn(x.shape, generator=random) for x in tensors())
    exact = tuple(x.double() for x in vectors)
    _, expected = hvp(loss(way, "reference"), tuple(tensors(torch.float64)), exact)
    for product in (hvp, vhp):
        assert_close(product(loss(way, backend), tuple(tensors()), vectors)[1], expected)
    assert len(told) == (backend != "reference")


@each_backend
def test_a_hessian_of_one_tensor_given_three_times(backend):
    def function(backend):
        return lambda x: loss("dense", backend)(x, x * 2, x, *tensors(x.dtype)[3:])

    expected = hessian(function("reference"), tensors(torch.float64)[0])
    assert_close([hessian(function(backend), tensors()[0])], [expected])
    assert_close([hessian(function(backend), tensors()[0], vectorize=True)], [expected])


@each_backend
@each_way
def test_gradient_penalties(way, backend):
    """A penalty on one tensor's gradient needs mixed derivatives of all five, by autograd.grad and by backward."""

    def penalty(leaves, backend):
        gradient = torch.autograd.grad(loss(way, backend)(*leaves), leaves[1], create_graph=True)[0]
        return gradient.square().sum()

    exact = [x.requires_grad_() for x in tensors(torch.float64)]
    expected = torch.autograd.grad(penalty(exact, "reference"), exact)
    leaves = [x.requires_grad_() for x in tensors()]
    assert_close(torch.autograd.grad(penalty(leaves, backend), leaves), expected)
    penalty(leaves, backend).backward()
    assert_close([x.grad for x in leaves], expected)


@each_backend
def test_third_derivatives(backend):
    def third(query, others, backend):
        first = torch.autograd.grad(loss("dense", backend)(query, *others), query, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), query, create_graph=True)[0]
        return torch.autograd.grad(second.pow(2).sum(), query)

    (exact, *others), (query, *same) = tensors(torch.float64), tensors()
    expected = third(exact.requires_grad_(), others, "reference")
    assert_close(third(query.requires_grad_(), same, backend), expected)


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
def test_the_other_tensors_may_be_constants(wanted):
    given = tensors()
    given[wanted].requires_grad_()
    for way in ("dense", "lse"):
        product = lambda backend, way=way: torch.autograd.grad(
            torch.autograd.grad(loss(way, backend)(*given), given[wanted], create_graph=True)[0].pow(2).sum(),
            given[wanted],
        )
        assert_close(product("eager"), product("reference"))


def test_a_cotangent_alone_asks_for_gradients():
    """The log-sum-exp does not depend on the values: their gradient is zero, and has a derivative."""
    query, key, value = (x.requires_grad_() for x in tensors()[:3])
    _, lse = disentangled_attention(query, key, value, return_lse=True)
    weights = torch.ones_like(lse, requires_grad=True)
    got = torch.autograd.grad(lse, [query, value], weights, create_graph=True)
    assert not got[1].any()
    _, again = disentangled_attention(query, key, value, return_lse=True, backend="reference")
    expected = torch.autograd.grad(again, query, weights, create_graph=True)
    for x in (query, weights):
        assert_close(
            torch.autograd.grad(got[0].pow(2).sum(), x, retain_graph=True),
            torch.autograd.grad(expected[0].pow(2).sum(), x, retain_graph=True),
        )


@pytest.mark.parametrize("way", ["dense", "masked", "dropout", "packed"])
def test_gradcheck(way):
    leaves = [x.requires_grad_() for x in tensors(torch.float64, length=6, size=3)]
    assert torch.autograd.gradcheck(attention(way, "eager"), leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attention(way, "eager"), leaves, check_batched_grad=way != "packed")


def test_half_precision():
    for dtype, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        given = tensors(dtype)
        ones = tuple(torch.ones_like(x) for x in given)
        expected = hvp(loss("dense", "reference"), *(tuple(x.double() for x in each) for each in (given, ones)))[1]
        with torch.autocast("cpu", torch.bfloat16):
            got = hvp(loss("dense", None), *map(tuple, (tensors(), (x.float() for x in ones))))[1]
        assert all(x.dtype == torch.float32 for x in got)
        for g, e in zip(hvp(loss("dense", None), tuple(given), ones)[1], expected, strict=True):
            assert g.dtype == dtype and (g.double() - e).abs().max() < bound * e.abs().max()


def test_autocast_around_backward_rounds_nothing():
    def penalty(leaves, backend, autocast):
        value = loss("dense", backend)(*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = torch.autograd.grad(value, leaves[0], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), leaves)

    expected = penalty([x.requires_grad_() for x in tensors(torch.float64)], "reference", False)
    assert_close(penalty([x.requires_grad_() for x in tensors()], None, True), expected)


def test_an_ordinary_backward_runs_the_kernels(monkeypatch, told):
    """The tools of training around it run the kernels too, and the reference never runs."""
    monkeypatch.setattr(backends.reference, "attention", lambda call: pytest.fail("the reference runs"))
    leaves = [x.requires_grad_() for x in tensors()]
    function = loss("dense", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(*leaves).backward(retain_graph=True)
        torch.autograd.grad(function(*leaves), leaves)
        jacobian(lambda query: attention("dense", None)(query, *leaves[1:]), leaves[0])
        torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False).backward()
        torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=True).backward()
    output = attention("dense", None)(*leaves)
    batched = torch.autograd.grad(output, leaves, torch.ones(2, *output.shape), is_grads_batched=True)
    single = torch.autograd.grad(attention("dense", None)(*leaves), leaves, torch.ones_like(output))
    for many, one in zip(batched, single, strict=True):
        torch.testing.assert_close(many, one.expand_as(many))
    assert not told


def test_hooks_on_saved_tensors():
    """Offloading and checkpointing rely on these hooks, also around a gradient penalty."""

    def penalty(leaves, backend):
        first = torch.autograd.grad(loss("dense", backend)(*leaves), leaves[0], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), leaves)

    leaves = [x.requires_grad_() for x in tensors()]
    expected = penalty(leaves, "reference")
    with torch.autograd.graph.save_on_cpu():
        assert_close(penalty(leaves, None), expected)
    point = lambda *x: torch.utils.checkpoint.checkpoint(loss("dense", None), *x, use_reentrant=False)
    first = torch.autograd.grad(point(*leaves), leaves[0], create_graph=True)[0]
    assert_close(torch.autograd.grad(first.square().sum(), leaves), expected)


def test_inference_mode():
    given = [x.requires_grad_() for x in tensors()]
    with torch.inference_mode():
        output = attention("dense", None)(*given)
    assert output.is_inference() and not output.requires_grad


def test_the_warning_is_given_once():
    query, *others = tensors()
    with pytest.warns(UserWarning, match="running the reference, .* only 'reference' has second derivatives") as caught:
        for _ in range(2):
            hvp(lambda x: loss("dense", None)(x, *others), query, query)
    assert len(caught) == 1


# The reference computes forward mode and torch.func, unless another backend is named


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).pow(2).sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones([], dtype=x.dtype))[0],
    "jvp": lambda f, x: jvp(f, (x,), (x.flip(-1),))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, -x])),
    "vmap of grad": lambda f, x: vmap(torch.func.grad(f))(torch.stack([x, -x])),
    "hvp": lambda f, x: jvp(torch.func.grad(f), (x,), (x.flip(-1),))[1],
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x.flip(-1)),
}
REASONS = {"linearize": "only 'reference' has forward-mode derivatives"}


@pytest.mark.parametrize("name", TRANSFORMS)
@each_way
def test_transforms(name, way, told):
    """The oracle is autograd's derivatives of the reference in float64, computed without torch.func."""
    if way == "dropout" and name in ("vmap", "vmap of grad", "jacfwd", "hessian", "linearize"):
        pytest.skip("torch refuses random operations there, or draws them anew; but see below")
    query, *others = tensors(torch.float64)
    f = lambda x: loss(way, "reference")(x, *others)
    vector = query.flip(-1)
    first = lambda x: jacobian(f, x)
    expected = {
        "jvp": lambda: (first(query) * vector).sum(),
        "linearize": lambda: (first(query) * vector).sum(),
        "grad of grad": lambda: 2 * hvp(f, query, first(query))[1],
        "hessian": lambda: hessian(f, query),
        "hvp": lambda: hvp(f, query, vector)[1],
        "vmap": lambda: torch.stack([f(query), f(-query)]),
        "vmap of grad": lambda: torch.stack([first(query), first(-query)]),
    }.get(name, lambda: first(query))()
    single = [x.float() for x in others]
    got = TRANSFORMS[name](lambda x: loss(way, None)(x, *single), query.float())
    assert_close([got], [expected])
    assert told == {REASONS.get(name, "only 'reference' can be transformed by torch.func")}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_named_backend_is_not_transformed(name, backend):
    query, *others = tensors()
    with pytest.raises(RuntimeError, match=f"{backend!r} cannot serve this call: only 'reference' "):
        TRANSFORMS[name](lambda x: loss("dense", backend)(x, *others), query)


def test_dropout_under_vmap():
    query, *others = tensors()
    both = torch.stack([query, query])
    run = lambda x: attention("dropout", None)(x, *others)
    with pytest.raises(RuntimeError, match="random"):
        vmap(run)(both)
    same = vmap(run, randomness="same")(both)
    different = vmap(run, randomness="different")(both)
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


def test_cu_seqlens_are_not_mapped_over():
    rows = [x[0].transpose(0, 1) for x in tensors()[:3]]
    run = lambda ends, rows: disentangled_attention_varlen(*rows, cu_seqlens=ends, max_seqlen=4).sum()
    for transformed in (vmap(run, in_dims=(0, None)), vmap(torch.func.grad(run, argnums=1), in_dims=(0, None))):
        with pytest.raises(RuntimeError, match="need a cu_seqlens with values"):
            transformed(torch.stack([ENDS, ENDS]), rows)
    inside = lambda *rows: run(ENDS.clone(), rows)
    got = torch.func.grad(inside, (0, 1, 2))(*rows)
    leaves = [x.clone().requires_grad_() for x in rows]
    assert_close(got, torch.autograd.grad(inside(*leaves), leaves))


@each_backend
@each_way
def test_forward_mode(way, backend):
    given = tensors(torch.float64)
    vectors = [x.flip(-1) for x in given]
    expected = [(jacobian(loss(way, "reference"), tuple(given))[i] * vectors[i]).sum() for i in range(5)]
    for i in range(5):
        duals, run = [x.float() for x in given], attention(way, backend)
        with forward_ad.dual_level():
            duals[i] = forward_ad.make_dual(duals[i], vectors[i].float())
            if backend not in (None, "reference"):
                with pytest.raises(RuntimeError, match="only 'reference' has forward-mode derivatives"):
                    run(*duals)
                continue
            with torch.no_grad():
                got = forward_ad.unpack_dual(loss(way, backend)(*duals)).tangent
            assert_close([got], [expected[i]])


@each_backend
def test_a_level_without_tangents_changes_nothing(backend, told):
    leaves = [x.requires_grad_() for x in tensors()]
    expected = torch.autograd.grad(loss("dense", backend)(*leaves), leaves)
    with forward_ad.dual_level():
        got = torch.autograd.grad(loss("dense", backend)(*leaves), leaves)
    assert all(map(torch.equal, got, expected)) and not told


@each_backend
def test_forward_mode_over_a_backward(backend):
    """The tangent arrives in backward, with the cotangent."""
    leaves = [x.requires_grad_() for x in tensors()]
    output = attention("dense", backend)(*leaves)
    cotangent, tangent = output.detach().sin(), output.detach().cos()
    expected = torch.autograd.grad(output, leaves, tangent, retain_graph=True)  # linear in the cotangent
    with forward_ad.dual_level():
        grads = torch.autograd.grad(output, leaves, forward_ad.make_dual(cotangent, tangent), retain_graph=True)
        assert_close([forward_ad.unpack_dual(x).tangent for x in grads], expected)
    products = lambda x, **keywords: torch.autograd.grad(output, leaves, x, retain_graph=True, **keywords)
    for create_graph in (False, True):
        both = vmap(lambda x, create=create_graph: products(x, create_graph=create))(torch.stack([tangent, -tangent]))
        assert_close([x[0] for x in both], expected)
        assert_close([-x[1] for x in both], expected)
    if backend == "reference":
        assert_close(jvp(products, (cotangent,), (tangent,))[1], expected)
        return
    with pytest.raises(RuntimeError, match="the backward pass of a call made outside of it"):
        jvp(products, (cotangent,), (tangent,))


def test_functional_call_runs_the_kernels(told):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(tensors()[3])

        def forward(self, *heads):
            return disentangled_attention(*heads, self.weight, **TABLE)

    layer, heads = Layer(), tensors()[:3]
    weights = {"weight": tensors()[4]}
    expected = disentangled_attention(*heads, weights["weight"], **TABLE)
    assert torch.equal(functional_call(layer, weights, tuple(heads)), expected) and not told
    got = torch.func.grad(lambda w: functional_call(layer, w, tuple(heads)).square().sum())(weights)
    leaf = weights["weight"].clone().requires_grad_()
    disentangled_attention(*heads, leaf, **TABLE).square().sum().backward()
    assert_close([got["weight"]], [leaf.grad])


def test_a_first_call_in_a_transform_keeps_real_tables():
    relative_position._on_devices.clear()
    given = tensors()
    torch.func.grad(loss("dense", None))(*given)
    kept = [x for tables in relative_position._on_devices.values() for x in tables[:2]]
    assert kept and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, kept))


# The operators, in programs that were traced before


def test_an_exported_program_is_transformed():
    class Module(torch.nn.Module):
        def forward(self, *given):
            return attention("masked", None)(*given)

    given = tensors()
    program = torch.export.export(Module(), tuple(given)).module()
    assert any("attention_forward" in str(node.target) for node in program.graph.nodes)
    f = lambda run: lambda *x: run(*x).pow(2).sum()
    exact = [x.double() for x in given]
    reference = f(attention("masked", "reference"))
    argnums = tuple(range(5))
    expected = torch.func.grad(reference, argnums)(*exact)
    assert_close(torch.func.grad(f(program), argnums)(*given), expected)
    vectors = tuple(x.flip(-1) for x in given)
    assert_close(
        hvp(f(program), tuple(given), vectors)[1], hvp(reference, tuple(exact), tuple(x.double() for x in vectors))[1]
    )
    assert_close([jvp(f(program), tuple(given), vectors)[1]], [sum((g * v).sum() for g, v in zip(expected, vectors))])
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, v) for x, v in zip(given, vectors)]
        tangent = forward_ad.unpack_dual(f(program)(*dual)).tangent
    assert_close([tangent], [sum((g * v).sum() for g, v in zip(expected, vectors))])


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_transforms(compiler):
    torch._dynamo.reset()
    query, *others = tensors()
    f = lambda x: loss("dense", None)(x, *others)
    expected = torch.autograd.grad(f(leaf := query.clone().requires_grad_()), leaf)
    assert_close([torch.compile(torch.func.grad(f), backend=compiler)(query)], expected)


def test_the_operator_of_backward_raises():
    leaves = [x.requires_grad_() for x in tensors()]
    from cases import Case, make_inputs

    call = make_inputs(Case("", 6, 6, batch=1, heads=2, size=8), torch.float32)
    output, lse = backends.forward(call, "eager")
    operator = torch.ops.deberta_fast.attention_backward
    arguments = (None, output, lse, *call._replace(query=call.query.clone().requires_grad_()), "eager", [True] * 5)
    with pytest.raises(RuntimeError, match="has no derivative; backend='reference' has all"):
        operator(output, *arguments)
    with torch.no_grad():
        assert operator(output, *arguments)[0].shape == leaves[0].shape
