"""patch(unpad=...): without padding, each sequence gets the states that an unpatched model computes for it alone."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from hf_models import assert_close, build, noise, randomise, results, tokens
from packed_batches import LAYOUTS, LENGTH, batch_of, flat, shapes_seen, spans_of
from torch._dynamo.testing import CompileCounterWithBackend

from deberta_fast import patch, unpatch

pytestmark = pytest.mark.usefixtures("exact_hf")
CONV5 = dict(conv_kernel_size=5, conv_groups=2, num_hidden_layers=3)
CASES = {
    **{name: (name, {}) for name in ("v1", "v1-p2p-counted", "v1-absolute", "v2", "v2-unbucketed-p2c", "v2-no-terms")},
    **{name: (name, {}) for name in ("v2-absolute", "v3", "v3-c2p")},
    "v1-narrow-embeddings": ("v1", dict(embedding_size=24)),
    "v2-conv-kernel-5": ("v2", CONV5),
    "v3-conv-kernel-7": ("v3", dict(conv_kernel_size=7, num_hidden_layers=1)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_sequence_is_as_unpatched_alone(case):
    name, changes = CASES[case]
    model = build(name, **changes).double()
    for layout in LAYOUTS:
        inputs, expected = batch_of(layout), []
        padding = inputs["attention_mask"] == 0
        with torch.no_grad():
            for row, start, stop in spans_of(inputs):
                one = {key: x[row : row + 1, start:stop] for key, x in inputs.items()}
                positions = torch.arange(start, stop)[None]  # absolute positions count from the row's start
                expected.append(flat(unpatch(model)(**one, position_ids=positions, output_hidden_states=True)))
            padded = flat(unpatch(model)(**inputs, output_hidden_states=True))
            for unpad, rows in itertools.product((True, "auto", False), ("hf", "zeros")):
                patch(model, unpad=unpad, padding_rows=rows)
                outputs = flat(model(**inputs, output_hidden_states=True))
                for place, (row, start, stop) in enumerate(spans_of(inputs)):
                    message, valid = f"{layout}, {unpad}, row {row}", inputs["attention_mask"][row, start:stop].bool()
                    for x, y in zip(outputs, expected[place], strict=True):
                        got = x[row, start:stop]
                        torch.testing.assert_close(got[valid], y[0, valid], rtol=0, atol=1e-10, msg=message)
                for x, y in zip(outputs, padded, strict=True):
                    there = y if rows == "hf" else y.masked_fill(padding.unsqueeze(-1), 0)
                    torch.testing.assert_close(x, there, rtol=0, atol=1e-10, msg=f"{layout}, {unpad}, {rows}")


HEADS = """v1-Model-left v1-ForMaskedLM-holes v1-ForSequenceClassification-right v1-Model-empty_rows
    v2-Model-holes v2-ForMaskedLM-left v2-ForTokenClassification-both_sides v2-Model-empty_rows v2-Model-single_tokens
    v3-Model-holes v3-ForMaskedLM-right v3-ForQuestionAnswering-right v3-Model-empty_rows""".split()


@pytest.mark.parametrize("case", HEADS)
def test_outputs_and_all_gradients(case, fused_calls):
    name, head, layout = case.split("-")
    model, inputs = build(name, head), batch_of(layout.replace("_", " "))
    exact = copy.deepcopy(model).double()
    expected, exactly = results(model, inputs), results(exact, inputs)
    assert_close(results(patch(exact, "eager", unpad=True), inputs), exactly)
    assert_close(results(patch(model, unpad=True), inputs), expected, 5e-5)
    assert len(fused_calls) == 4


def test_layers_see_tokens_alone():
    model, inputs = build("v2"), batch_of("holes")
    seen = shapes_seen(model)
    for options, shape in (
        ({"unpad": True}, (75, 64)),  # the tokens, and one row of padding for each of two sequences
        ({}, (3, LENGTH, 64)),
        ({"unpad": "auto"}, (75, 64)),
        ({"unpad": True, "padding_rows": "zeros"}, (73, 64)),
        ({"unpad": False}, (3, LENGTH, 64)),
    ):
        patch(model, **options)(**inputs)
        assert seen == [shape] * 2, options
        seen.clear()
    patch(model, unpad="auto")(**batch_of("full"))
    model(inputs["input_ids"])
    assert {x[1:] for x in seen} == {(LENGTH, 64)}
    seen.clear()
    model(**{**inputs, "attention_mask": inputs["attention_mask"].float()})
    assert set(seen) == {(75, 64)}
    seen.clear()
    patch(model, unpad=True)(**batch_of([(0, 37), (0, 35)]))
    model(**batch_of([(0, 37), (0, 36)]))  # one row of padding is not worth packing
    assert seen == [(73, 64)] * 2 + [(2, LENGTH, 64)] * 2


def test_a_batch_without_any_token():
    for name in ("v1", "v2", "v3"):
        model = patch(build(name), unpad=True)
        output = model(**batch_of([(0, 0), (0, 0)])).last_hidden_state
        assert output.shape == (2, LENGTH, 64) and torch.isfinite(output).all()
        output.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_values_of_unpad_and_what_stays():
    model, inputs = build("v3", "ForTokenClassification"), batch_of("left")
    with torch.no_grad():
        expected = model(**inputs)[0]
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        state = {key: x.clone() for key, x in model.state_dict().items()}
        for wrong in ("yes", 1, 0, None):
            with pytest.raises(ValueError, match=f'unpad must be False, "auto" or True, got {wrong!r}'):
                patch(model, unpad=wrong)
        assert torch.equal(model(**inputs)[0], expected)
        padded = patch(model)(**inputs)[0]
        packed = patch(model, unpad=True, padding_rows="zeros")(**inputs)[0]
        with pytest.raises(ValueError, match="unpad"):
            patch(model, unpad="always")
        with pytest.raises(ValueError, match='padding_rows must be "hf" or "zeros", got None'):
            patch(model, padding_rows=None)
        outside = inputs["attention_mask"] == 0
        assert torch.equal(model(**inputs)[0], packed) and torch.equal(packed[outside][0], packed[outside][-1])
        assert not torch.equal(padded[outside], packed[outside])
        assert torch.equal(patch(model)(**inputs)[0], padded)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
        assert torch.equal(unpatch(patch(model, unpad=True))(**inputs)[0], expected)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name


def caught(run, times=2):
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        outputs = [run() for _ in range(times)]
    return outputs[-1], [str(x.message) for x in messages if "deberta_fast" in str(x.message)]


@pytest.mark.parametrize("dimensions", [3, 4])
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_masks_of_pairs_keep_padding(name, dimensions):
    encoder, states = build(name).encoder, noise(3, LENGTH, 64).float()
    mask = batch_of("right")["attention_mask"]
    mask = mask[:, None] * mask[:, :, None]
    mask = mask[:, None] if dimensions == 4 else mask
    expected, silence = caught(lambda: flat(patch(encoder)(states, mask)))
    assert not silence
    for unpad, count in (("auto", 0), (True, 1)):
        patch(encoder, unpad=unpad)
        got, messages = caught(lambda: flat(encoder(states, mask)))
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        assert len(messages) == count and all("padding stays" in x and "pairs" in x for x in messages)


@pytest.mark.parametrize("reason", ["output_attentions", "talking heads"])
def test_what_is_not_fused_keeps_padding(reason):
    heads = reason == "talking heads"
    model = build("v1", **(dict(talking_head=True) if heads else {}))
    inputs = batch_of("right") | ({} if heads else {"output_attentions": True})
    expected = flat(model(**inputs))
    for unpad in ("auto", True):
        patch(model, unpad=unpad)
        got, messages = caught(lambda: flat(model(**inputs)))
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        assert len(messages) == 1 and reason in messages[0]


def test_hidden_states_and_tuples():
    model, inputs = patch(build("v2"), unpad=True), batch_of("both sides")
    named = model(**inputs, output_hidden_states=True)
    assert len(named.hidden_states) == 3 and all(x.shape == (3, LENGTH, 64) for x in named.hidden_states)
    by_position = model(**inputs, output_hidden_states=True, return_dict=False)
    assert type(by_position) is tuple and len(by_position) == 2 and len(by_position[1]) == 3
    pairs = zip([by_position[0], *by_position[1]], flat(named), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    assert list(model(**inputs)) == ["last_hidden_state"] and len(model(**inputs, return_dict=False)) == 1
    assert torch.equal(model(**inputs)[0], named[0])


@pytest.mark.parametrize("name, changes", [("v1", {}), ("v2", CONV5), ("v3", {})], ids=["v1", "v2", "v3"])
def test_neighbours_do_not_touch(name, changes):
    model, inputs = patch(build(name, **changes), unpad=True), batch_of([(0, 3), (30, 37), (0, 1), (36, 37), (5, 21)])
    rows = spans_of(inputs)
    with torch.no_grad():
        expected = model(**inputs)[0]
    for changed in range(len(rows)):
        ids = inputs["input_ids"].clone()
        ids[changed] = ids[changed] % 69 + 1
        with torch.no_grad():
            got = model(**{**inputs, "input_ids": ids})[0]
        for row in range(len(rows)):
            assert torch.equal(got[row], expected[row]) == (row != changed), (changed, row)
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    outputs = model(inputs_embeds=embeddings.clone(), **inputs)[0]  # transformers 4.48 adds in place
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    for row, start, stop in rows:
        loss = (outputs[row].square() * noise(LENGTH, 64)).sum()
        (gradient,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
        assert gradient[row, start:stop].ne(0).any(-1).all()
        gradient[row, start:stop] = 0
        assert not gradient.any(), row


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_gradient_checkpointing(name, reentrant, dropout):
    model = build(name, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout).double().train()
    patch(model, unpad=True)
    inputs = batch_of("holes")
    torch.manual_seed(0)
    expected = results(model, inputs)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    shapes = []
    for layer in model.encoder.layer:  # hooks of the checkpointed layer itself run only once
        layer.attention.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    torch.manual_seed(0)
    assert_close(results(model, inputs), expected)
    assert shapes == [(75, 64)] * 4


def test_dropout_has_the_statistics_of_padded_dropout():
    model = build("v1", num_hidden_layers=1, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.05).train()
    inputs = batch_of([(0, 9), (3, 15), (0, 4)])
    samples = {}
    for unpad in (False, True):
        patch(model, unpad=unpad)
        torch.manual_seed(1)
        samples[unpad] = torch.stack([results(model, inputs, gradients=False)[0][0] for _ in range(200)]).double()
    torch.manual_seed(1)
    assert torch.equal(results(model, inputs, gradients=False)[0][0].double(), samples[True][0])
    packed, padded = samples[True], samples[False]
    z = (packed.mean(0) - padded.mean(0)) / ((packed.var(0) + padded.var(0)) / 200).sqrt()
    assert 0.75 < z.square().mean() < 1.3 and z.abs().max() < 6
    assert 0.93 < packed.var(0).mean() / padded.var(0).mean() < 1.07


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_bfloat16(name, kind):
    model, inputs = build(name), batch_of("holes")
    exact = results(model, inputs)[1]
    error = {}
    for unpad in (False, True):
        other = patch(copy.deepcopy(model), unpad=unpad)
        other = other.bfloat16() if kind == "bfloat16" else other
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            outputs, got = results(other, inputs)
        assert kind == "autocast" or outputs[0].dtype == torch.bfloat16
        pairs = [(got[key].float(), x) for key, x in exact.items() if x is not None]
        error[unpad] = torch.stack([(x - y).norm() / max(1, y.norm()) for x, y in pairs]).mean()
    assert 0 < error[True] < 1.3 * error[False] < 0.05


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies(copied):
    model, inputs = patch(build("v2"), unpad=True), batch_of("left")
    twin, expected = copied(model), model(**inputs)[0]
    seen = shapes_seen(twin)
    assert torch.equal(twin(**inputs)[0], expected) and seen == [(71, 64)] * 2
    for p in twin.parameters():
        p.data.zero_()
    assert not torch.equal(twin(**inputs)[0], expected) and torch.equal(model(**inputs)[0], expected)
    unpatch(twin)(**inputs)
    assert seen[-1] == (3, LENGTH, 64) and torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize(
    "name, targets", [("v1", ["in_proj", "dense"]), ("v2", ["query_proj", "conv.conv"]), ("v3", ["key_proj"])]
)
def test_lora(name, targets, fused_calls):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8)
    model, inputs = randomise(peft.get_peft_model(build(name), config)).double(), batch_of("holes")
    expected = results(model, inputs)
    assert_close(results(patch(model, unpad=True), inputs), expected)
    assert len(fused_calls) == 2
    assert_close(results(patch(model), inputs), expected)


def test_compiled_models_keep_their_padding():
    torch._dynamo.reset()
    model, inputs = build("v3"), batch_of("holes")
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = patch(model)(**inputs)[0]
        packed = patch(model, unpad=True)(**inputs)[0]
        got = torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0]
        patch(model, unpad=True, padding_rows="zeros")
        zeros = torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got, packed)
    torch.testing.assert_close(zeros, got * valid.unsqueeze(-1))


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_layers_compile_one_by_one(name):
    """Layers see inputs without padding, whose number of tokens varies. Each layer compiles at most twice."""
    torch._dynamo.reset()
    model, counter = patch(build(name), unpad=True), CompileCounterWithBackend("aot_eager")
    layouts = ["right", [(0, 30), (0, 7), (2, 9), (4, 22)], [(7, 30), (5, 16)]]
    expected = [results(model, batch_of(layout)) for layout in layouts]
    for layer in model.encoder.layer:
        layer.compile(backend=counter)
    seen = shapes_seen(model)
    for layout, (outputs, gradients) in zip(layouts, expected, strict=True):
        got = results(model, batch_of(layout))
        torch.testing.assert_close(got[0], outputs, atol=1e-4, rtol=1e-4)
        for key, x in gradients.items():
            torch.testing.assert_close(got[1][key], x, rtol=1e-4, atol=1e-4 * max(1, float(x.abs().max())), msg=key)
    assert {len(shape) for shape in seen} == {2} and 0 < counter.frame_count <= 4


def test_padding_that_stays_silences_no_fallback():
    model, inputs = patch(build("v3"), unpad=True), tokens("left")
    pairs = inputs["attention_mask"][:, None] * inputs["attention_mask"][:, :, None]
    with pytest.warns(UserWarning, match="padding stays"):
        model.encoder(model.embeddings(inputs["input_ids"]), pairs)
    model.encoder.layer[0].attention.self.dropout = torch.nn.AlphaDropout(0.1)
    table, mask = model.encoder.get_rel_embedding(), torch.ones(1, 1, 9, 9, dtype=torch.bool)
    with pytest.warns(UserWarning, match="running Hugging Face's own attention"):
        model.encoder.layer[0].attention.self(torch.randn(1, 9, 64), mask, rel_embeddings=table)
