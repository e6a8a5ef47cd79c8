"""Projected tables that inference keeps: reused while weights stay, computed again after any change of them."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.utils.prune
from native_models import EMD, build, tokens
from torch import nn

import deberta_fast.models.attention
from deberta_fast.models.weight_cache import WeightCache


@pytest.fixture
def projected(monkeypatch):
    """The linear layers that projected rows of tables, one per call."""
    calls, project_table = [], deberta_fast.models.attention.project_table

    def recording(*arguments):
        project = deberta_fast.models.attention.project
        with monkeypatch.context() as patches:
            patches.setattr(
                deberta_fast.models.attention, "project", lambda linear, x: calls.append(linear) or project(linear, x)
            )
            return project_table(*arguments)

    monkeypatch.setattr(deberta_fast.models.attention, "project_table", recording)
    return calls


def run(model, length=37, **options):
    with torch.no_grad():
        return model(**tokens("right", length), **options).last_hidden_state


def unkept(model, length=37):
    """Like ``run``, with a copy of the model, which has no tables yet."""
    return run(copy.deepcopy(model), length)


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_made_once(name, projected):
    model = build(name)
    first = run(model)
    made = len(projected)
    assert made == 4  # two terms, two layers
    assert torch.equal(run(model), first)
    for length in (5, 61):
        torch.testing.assert_close(run(model, length), unkept(model, length), rtol=0, atol=0)
        projected[made:] = []
    with torch.inference_mode():
        assert torch.equal(model(**tokens("right", 37)).last_hidden_state, first)
    assert len(projected) == made


def swapped_rows(weight):
    weight.data[[0, 1]] = weight.data[[1, 0]]


def by_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1).step()
    weight.grad = None


def in_inference_mode(weight):
    with torch.inference_mode():
        weight.mul_(1.5)


WRITES = {
    "optimizer": by_optimizer,
    "copy_": lambda weight: weight.detach().copy_(2 * weight.detach()),
    "data": lambda weight: weight.data.mul_(1.5),
    "one number through data": lambda weight: weight.data.view(-1)[weight.numel() // 2].add_(1.0),
    "rows swapped through data": swapped_rows,
    "data set": lambda weight: setattr(weight, "data", weight.data * 1.5),
    "inference mode": in_inference_mode,
}
SOURCES = {
    "table": lambda model: model.encoder.rel_embeddings.weight,
    "norm": lambda model: model.encoder.LayerNorm.bias,
    "key_proj": lambda model: model.encoder.layer[1].attention.self.key_proj.weight,
    "query_proj's bias": lambda model: model.encoder.layer[0].attention.self.query_proj.bias,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("source", SOURCES)
def test_writes_are_seen(source, write):
    model = build("v3")
    before = run(model)
    WRITES[write](SOURCES[source](model))
    got = run(model)
    assert torch.equal(got, unkept(model)) and not torch.equal(got, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_single_number_is_seen(dtype):
    """The cache sees every change, also one that would not change a product with another vector."""
    weights = [torch.randn(64, 96).to(dtype), torch.randn(96).to(dtype)]
    cache, made = WeightCache(), []
    get = lambda: cache.get(weights, lambda: made.append(1))
    with torch.no_grad():
        get()
        for weight in weights:
            for index in range(0, weight.numel(), 97):
                for change in (torch.neg, torch.zeros_like, lambda x: x * (1 + torch.finfo(dtype).eps)):
                    x, before = weight.data.view(-1)[index], len(made)
                    changed = change(x.clone())
                    same = torch.equal(changed.view(1), x.view(1))
                    x.copy_(changed)
                    get()
                    assert len(made) == before + (not same)
        weights[0].data[3, 5] = 0.0
        get()
        before = len(made)
        weights[0].data[3, 5] = -0.0
        get()
        assert len(made) == before + 1
        weights[0].data[3, 5] = torch.nan  # weights are compared by their bits, so NaN equals itself
        get(), get()
        assert len(made) == before + 2


def test_parameters_handed_in_as_tensors():
    model, inputs = build("v3"), tokens("right")
    values = {name: x.detach().clone() for name, x in model.named_parameters()}
    run = lambda: torch.func.functional_call(model, values, (inputs["input_ids"],)).last_hidden_state
    with torch.no_grad():
        before = run()
        for name in ("encoder.rel_embeddings.weight", "encoder.layer.0.attention.self.key_proj.weight"):
            values[name].numpy()[:] *= -1
            after = run()
            assert not torch.equal(after, before)
            assert torch.equal(
                after, torch.func.functional_call(copy.deepcopy(model), values, (inputs["input_ids"],))[0]
            )
            before = after


def test_pruned_tables():
    model = build("v3")
    nn.utils.prune.l1_unstructured(model.encoder.rel_embeddings, "weight", amount=0.3)
    before = run(model)
    model.encoder.rel_embeddings.weight.data.zero_()
    after = run(model)
    model.set_constant_weights(False)  # forgets what was kept
    assert torch.equal(run(model), after) and not torch.equal(after, before)


@pytest.mark.parametrize("constant", [False, True])
def test_settings_are_seen(constant):
    model = build("v3")
    model.set_constant_weights(constant)
    before = run(model)
    model.encoder.LayerNorm.eps = 0.5
    assert torch.equal(run(model), unkept(model)) and not torch.equal(run(model), before)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert torch.equal(run(model), unkept(model))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(run(model), unkept(model))


def doubled(module, inputs, output):
    return output * 2


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("place", ["encoder.LayerNorm", "encoder.layer.0.attention.self.pos_dropout"])
def test_hooks_on_the_way_are_seen(place, constant):
    model = build("v3")
    model.set_constant_weights(constant)
    module, before = model.get_submodule(place), run(model)
    everywhere = lambda other, inputs, output: output * 2 if other is module else None
    for register in (module.register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = register(doubled if register == module.register_forward_hook else everywhere)
        with_hook = run(model), run(model), unkept(model)
        handle.remove()
        assert torch.equal(with_hook[0], with_hook[1]) and not torch.equal(with_hook[0], before)
        if register == module.register_forward_hook:  # the global hook ignores the module of a copy
            torch.testing.assert_close(with_hook[0], with_hook[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("constant", [False, True])
def test_fused_optimizers(kind, constant):
    """torch does not count the writes of fused optimizers."""
    model = build("v3")
    model.set_constant_weights(constant)
    optimizer = kind(model.parameters(), lr=0.1, fused=True)
    model(**tokens("right")).last_hidden_state.square().sum().backward()
    before = run(model)
    optimizer.step()
    assert torch.equal(run(model), unkept(model)) and not torch.equal(run(model), before)


@pytest.mark.parametrize("name", ["v1", "v2-unbucketed-p2c"])
def test_tables_of_their_own_projections(name):
    model = build(name)
    run(model)
    attention = model.encoder.layer[0].attention.self
    for name in ("pos_key_proj", "pos_query_proj"):
        if hasattr(attention, name):
            getattr(attention, name).weight.data.mul_(1.5)
            assert torch.equal(run(model), unkept(model))


def test_other_weights_in_its_place():
    model, other = build("v3"), build("v3")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    before, expected = run(model), run(other)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model), expected)
    layer = model.encoder.layer[0].attention.self
    layer.key_proj = copy.deepcopy(build("v3").encoder.layer[0].attention.self.key_proj)
    assert torch.equal(run(model), unkept(model))
    layer.key_proj.weight = nn.Parameter(layer.key_proj.weight.detach() * 2)
    assert torch.equal(run(model), unkept(model))
    assert not torch.equal(run(model), before)


def test_casts_and_autocast():
    model = build("v3")
    run(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model), unkept(model))
    assert torch.equal(run(model), unkept(model))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model.to(dtype)
        for _ in range(2):
            assert run(model).dtype == dtype and torch.equal(run(model), unkept(model))


def test_tables_that_torch_counts_no_writes_of():
    attention = build("v3").encoder.layer[0].attention.self
    with torch.inference_mode():
        states, table = torch.randn(1, 20, 32), torch.randn(32, 32)
        before, _ = attention(states, None, table)
        table.mul_(2)
        after, _ = attention(states, None, table)
    assert not torch.equal(after, before)


def test_nothing_is_kept_in_training(projected):
    model = build("v3", hidden_dropout_prob=0.5)
    run(model)
    kept = model.encoder.layer[0].attention.self.cache.tables
    assert kept._cached is not None
    for _ in range(2):
        projected.clear()
        model(**tokens("right", 37)).last_hidden_state.sum().backward()
        assert len(projected) == 4 and kept._cached is None  # two terms, two layers
    assert model.encoder.rel_embeddings.weight.grad is not None
    run(model)
    assert kept._cached is not None
    torch.manual_seed(0)
    first, second = run(model.train()), run(model)
    assert kept._cached is None and not torch.equal(first, second)  # dropout on the rows of the table


def test_gradients_after_inference_mode():
    model = build("v3")
    with torch.inference_mode():
        model(**tokens("right", 37))
    model(**tokens("right", 37)).last_hidden_state.sum().backward()
    run(model)


def test_hooks_and_adapters_run_each_time(projected):
    model, seen = build("v3"), []
    run(model)
    linear = model.encoder.layer[0].attention.self.key_proj
    handle = linear.register_forward_hook(lambda *_: seen.append(1))
    run(model), run(model)
    assert len(seen) == 4  # once for tokens and once for the table, in each run
    handle.remove()
    model.encoder.LayerNorm.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(run(model), unkept(model))


class Adapted(nn.Module):
    """A norm as adapters wrap it: it has weights of the same names, but other weights determine the output."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.own = norm.weight, norm.bias, copy.deepcopy(norm)

    def forward(self, x):
        return self.own(x)


def test_norms_that_are_more_than_torchs():
    model = build("v3")
    run(model)
    model.encoder.LayerNorm = Adapted(model.encoder.LayerNorm)
    before = run(model)
    model.encoder.LayerNorm.own.weight.data.mul_(1.5)
    assert torch.equal(run(model), unkept(model)) and not torch.equal(run(model), before)
    model.encoder.LayerNorm = nn.Identity()
    assert torch.equal(run(model), unkept(model))


def test_compiled_with_constant_weights():
    torch._dynamo.reset()
    model, inputs = build("v3", num_hidden_layers=1), tokens("right", 37)
    model.set_constant_weights(True)
    expected = run(model)
    with torch.no_grad():
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).last_hidden_state
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_are_without():
    model = build("v3")
    sizes = []
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        sizes.append(len(pickle.dumps(model)))
        expected = run(model)
    assert sizes[0] == sizes[1]
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(run(other), expected)
        other.encoder.rel_embeddings.weight.data.mul_(2)
        assert not torch.equal(run(other), expected)
    assert torch.equal(run(model), expected)


def test_constant_weights_are_not_looked_at():
    model = build("v3")
    model.set_constant_weights(True)
    expected, weight = run(model), model.encoder.layer[0].attention.self.key_proj.weight
    torch.testing.assert_close(expected, run(build("v3")), rtol=1e-5, atol=1e-5)  # one product instead of three
    weight.data.mul_(2)
    assert torch.equal(run(model), expected)  # the promise is broken, and the model does not notice
    weight.data = weight.data.clone()  # moving a module does the same
    second = run(model)
    assert torch.equal(second, unkept(model)) and not torch.equal(second, expected)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(run(model), unkept(model)) and not torch.equal(run(model), second)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.encoder.layer[0].attention.self.cache.joint.constant
    model.set_constant_weights(False)
    weight.data.mul_(2)
    assert torch.equal(run(model), unkept(model))


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
@pytest.mark.parametrize("length", [5, 61])
def test_three_projections_as_one(name, length):
    model, inputs = build(name), tokens("holes", 61) if length > 40 else tokens("none", length)
    expected = model(**inputs).last_hidden_state
    model.set_constant_weights(True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert model.encoder.layer[1].attention.self.cache.joint._cached is not None
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)  # with gradients
    assert model.encoder.layer[1].attention.self.cache.joint._cached is None


def test_queries_of_other_states():
    model, inputs = build("v3", "ForMaskedLM", **EMD), tokens("right")
    expected = model(**inputs).logits
    model.set_constant_weights(True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_threads():
    """Threads with different weights share a cache, and none of them gets the table of another."""
    cache, weights, wrong = WeightCache(), [nn.Parameter(torch.full((4, 4), float(i))) for i in range(3)], []

    def work(weight):
        for _ in range(300):
            with torch.no_grad():
                if not torch.equal(cache.get([weight], lambda: weight + 1), weight + 1):
                    wrong.append(weight)

    threads = [threading.Thread(target=work, args=(weight,)) for weight in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
