"""patch and unpatch, judged by Hugging Face's own models; `make test-oldest` runs this with transformers 4.48 too."""

import copy
import warnings

import pytest
import torch
from hf_models import LENGTH, assert_as_precise, assert_close, build, noise, results, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from deberta_fast import patch, unpatch

pytestmark = pytest.mark.usefixtures("exact_hf")
HEADS = """v1-Model-right v1-ForMaskedLM-holes v1-ForSequenceClassification-right v1-ForTokenClassification-left
    v1-ForQuestionAnswering-absent v1-whole-table-c2p-Model-left v1-p2p-counted-Model-right v1-absolute-Model-holes
    v2-Model-right v2-ForMaskedLM-left v2-ForTokenClassification-holes v2-ForQuestionAnswering-empty
    v2-unbucketed-p2c-Model-right v2-no-terms-Model-right v2-absolute-Model-left v3-Model-left v3-ForMaskedLM-right
    v3-ForSequenceClassification-holes v3-ForTokenClassification-absent v3-ForQuestionAnswering-right
    v3-ForMultipleChoice-right v3-c2p-Model-holes""".split()


@pytest.mark.parametrize("case", HEADS)
def test_outputs_and_all_gradients(case, fused_calls):
    name, head, padding = case.rsplit("-", 2)
    model = build(name, head)
    draws = [tokens(padding, choices=(2,) if head == "ForMultipleChoice" else (), seed=seed) for seed in range(6)]
    run = lambda model: [results(model, inputs) for inputs in draws]
    exact_model = copy.deepcopy(model).double()
    exact, eager, got = run(exact_model), run(model), run(patch(model))
    assert len(fused_calls) == 2 * len(draws)  # one per layer
    trained = [name for name, grad in exact[0][1].items() if grad is not None]
    assert [name for name, grad in got[0][1].items() if grad is not None] == trained
    assert_as_precise(*([outputs for outputs, _ in runs] for runs in (got, eager, exact)))
    assert_as_precise(*([[grads[name] for name in trained] for _, grads in runs] for runs in (got, eager, exact)))
    assert_close(results(patch(exact_model), draws[0]), exact[0])


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_bfloat16_model(name):
    model, draws = build(name).bfloat16(), [tokens("holes", seed=seed) for seed in range(6)]
    run = lambda model: [results(model, inputs, gradients=False)[0] for inputs in draws]
    exact, eager, got = run(copy.deepcopy(model).double()), run(model), run(patch(model))
    assert_as_precise(got, eager, exact)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_autocast(name, fused_calls):
    model, inputs = build(name), tokens()
    # eager is a bfloat16 model: Hugging Face's v1 raises under autocast, as float32's lowest number overflows bfloat16.
    exact, eager = results(copy.deepcopy(model).double(), inputs), results(copy.deepcopy(model).bfloat16(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(patch(model), inputs)
    assert len(fused_calls) == 2 and all(grad.dtype == torch.float32 for grad in got[1].values())
    flat = [[x.double() for x in (*outputs, *grads.values())] for outputs, grads in (got, eager, exact)]
    error = [torch.stack([(x - z).norm() / max(1.0, z.norm()) for x, z in zip(xs, flat[2])]) for xs in flat[:2]]
    assert error[0].mean() <= 1.5 * error[1].mean() and error[0].max() <= 2 * error[1].max()


def test_hidden_states_and_tuples():
    model, inputs = build("v2", num_hidden_layers=3).double(), tokens("left")
    mask, inputs["output_hidden_states"] = inputs["attention_mask"].bool(), True
    expected, got = model(**inputs, return_dict=False), patch(model)(**inputs, return_dict=False)
    named = model(**inputs)
    assert type(got) is type(expected) is tuple and len(got) == len(expected) == 2
    assert len(got[1]) == len(expected[1]) == 4 and named.attentions is None
    for x, y, z in zip((got[0], *got[1]), (expected[0], *expected[1]), (named[0], *named[1]), strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=0, atol=1e-10)
        assert torch.equal(x, z)


def test_encoder_alone_with_pairwise_mask(fused_calls):
    encoder, states = build("v3").encoder.double(), noise(2, LENGTH, 64)
    mask = (noise(2, LENGTH, LENGTH) > -0.3).long()
    for given in (mask, mask[:, None]):
        expected = unpatch(encoder)(states, given, output_hidden_states=False)
        got = patch(encoder)(states, given, output_hidden_states=False)
        assert got.hidden_states is None and expected.hidden_states is None
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-10)
    assert len(fused_calls) == 4


@pytest.mark.parametrize("queries", [{}, {"query_states": noise(3, LENGTH, 64)[2:]}], ids=["", "query_states"])
def test_attention_module_alone(queries, fused_calls):
    encoder = build("v2").double().encoder
    attention, states, table = encoder.layer[0].attention.self, noise(1, LENGTH, 64), encoder.get_rel_embedding()
    mask = torch.arange(LENGTH)[None, None, None] < 50
    expected, _ = attention(states, mask, rel_embeddings=table, **queries)
    got, nothing = patch(attention)(states, mask, rel_embeddings=table, **queries)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert nothing is None and len(fused_calls) == 1
    everything, _ = attention(states, torch.ones_like(mask), rel_embeddings=table, **queries)
    assert torch.equal(attention(states, None, rel_embeddings=table, **queries)[0], everything)


def test_v1_attention_module_alone():
    attention, states = build("v1").double().encoder.layer[0].attention.self, noise(1, LENGTH, 64)
    mask, table = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool), noise(48, 64)
    expected, _ = attention(states, mask, rel_embeddings=table)
    torch.testing.assert_close(patch(attention)(states, mask, rel_embeddings=table)[0], expected, rtol=0, atol=1e-10)


def encode(model, inputs, **options):
    return model.encoder(model.embeddings(inputs["input_ids"]), inputs["attention_mask"], **options)


FALLBACKS = {
    "output_attentions": ("v3", {}, lambda model, x: model(**x, output_attentions=True)),
    "talking heads": ("v1", dict(talking_head=True), lambda model, x: model(**x)),
    "custom relative_pos": ("v2", {}, lambda m, x: encode(m, x, relative_pos=(9 * noise(83, 83)).long())),
    "query_states": ("v3", {}, lambda m, x: encode(m, x, query_states=m.embeddings(x["input_ids"] // 2))),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_is_not_fused_is_the_original_and_warns_once(reason, fused_calls):
    name, changes, call = FALLBACKS[reason]
    model, inputs = build(name, **changes).double(), tokens("left")  # float64: linear layers and norms stay torch's
    expected = call(model, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch(model)
        outputs = [call(model, inputs), call(model, inputs)]
    flat = lambda output: [x for item in output.to_tuple() for x in (item if isinstance(item, tuple) else (item,))]
    for output in outputs:
        assert all(torch.equal(x, y) for x, y in zip(flat(output), flat(expected), strict=True))
    messages = [str(w.message) for w in caught if "deberta_fast" in str(w.message)]
    assert not fused_calls and len(messages) == 1 and reason in messages[0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_gradient_checkpointing(name, reentrant, dropout):
    """Gradients are the same as without, also with dropout: the second forward must draw the same dropout masks."""
    model = build(name, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout).double().train()
    torch.manual_seed(0)
    expected = results(patch(model), tokens())
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    runs = []
    model.encoder.layer[0].intermediate.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(0)
    assert_close(results(model, tokens()), expected)
    assert len(runs) == 2


def test_dropout_follows_the_seed_and_is_unbiased():
    encoder = patch(build("v3", attention_probs_dropout_prob=0.3).encoder.double())
    attention, states, table = (
        encoder.layer[0].attention.self,
        noise(1, LENGTH, 64),
        encoder.get_rel_embedding().detach(),
    )

    def run(seed):
        torch.manual_seed(seed)
        return attention(states, torch.ones(1, LENGTH, dtype=torch.bool), rel_embeddings=table)[0].detach()

    expected = run(0)
    assert torch.equal(expected, run(1))
    attention.train()
    samples = torch.stack([run(seed) for seed in range(150)])
    assert torch.equal(samples[7], run(7)) and not torch.equal(samples[7], samples[8])
    z = (samples.mean(0) - expected) / (samples.std(0) / len(samples) ** 0.5)
    assert 0.8 < z.square().mean() < 1.25 and z.abs().max() < 6


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_nothing_is_quadratic_in_the_length(name):
    """No operand of any operator has a shape that ends in (523, 523), also inside the fused operator."""
    model, inputs = build(name, max_position_embeddings=600), tokens("holes", length=523)

    def quadratic_shapes():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            results(model, inputs)
        return {tuple(x) for event in profile.events() for x in event.input_shapes or [] if x[-2:] == [523, 523]}

    assert {(2, 1, 523, 523), (1, 523, 523)} <= quadratic_shapes()
    patch(model, "eager")  # it takes 512 queries at a time
    assert not quadratic_shapes()


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_compiles_whole_and_once_for_all_lengths(name):
    torch._dynamo.reset()
    model = patch(build(name, num_hidden_layers=1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (41, 60, 83):
        inputs = tokens("left", length)
        expected, got = results(model, inputs), results(compiled, inputs)
        torch.testing.assert_close(got[0], expected[0])
        for grad, (key, want) in zip(got[1].values(), expected[1].items(), strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4, msg=key)
    assert counter.frame_count == 2  # one for the first length, one for all others


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_exports(name):
    model, inputs = patch(build(name, num_hidden_layers=1)), tokens("left")
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
        torch.testing.assert_close(program.module()(**inputs)[0], model(**inputs)[0])
    assert any("deberta_fast" in str(node.target) for node in program.graph.nodes)
