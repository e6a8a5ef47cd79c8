"""Batches without their padding: every sequence comes out as if it ran alone, in padded batches and packed."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from native_models import CONFIGS, EMD, build, names, tokens
from packed_batches import (
    LAYOUTS,
    LENGTH,
    assert_same_gradients,
    batch_of,
    flat,
    gradients_of,
    packed_of,
    shapes_seen,
    spans_of,
)
from torch.nn import functional as F


def alone(model, inputs, shifted, **options):
    """Outputs of every sequence by itself, without padding. If ``shifted``, positions count from the row's start."""
    model.set_unpad(False)
    outputs = []
    for row, start, stop in spans_of(inputs):
        one = {key: x[row : row + 1, start:stop] for key, x in inputs.items()}
        if one["attention_mask"].all():
            del one["attention_mask"]
        if shifted:
            one["position_ids"] = torch.arange(start, stop)[None]
        outputs.append(model(**one, **options))
    return outputs


def assert_as_alone(model, inputs, tolerance, layout):
    close = dict(rtol=tolerance, atol=tolerance)
    options = dict(output_hidden_states=True)
    expected = [flat(x) for x in alone(model, inputs, True, **options)]
    valid = inputs["attention_mask"].bool()
    model.set_unpad(False)
    padded = flat(model(**inputs, **options))  # test_hf_model.py compares its rows of padding with Hugging Face's
    for unpad, rows in itertools.product((True, "auto", False), ("hf", "zeros")):
        model.set_unpad(unpad, rows)
        outputs = flat(model(**inputs, **options))
        for place, (row, start, stop) in enumerate(spans_of(inputs)):
            for x, y in zip(outputs, expected[place], strict=True):
                message, tokens = f"{layout}, {unpad}, row {row}", valid[row, start:stop]
                torch.testing.assert_close(x[row, start:stop][tokens], y[0, tokens], msg=message, **close)
        for x, y in zip(outputs, padded, strict=True):
            if rows == "hf" and not getattr(model.config, "enhanced_mask_decoder", False):
                torch.testing.assert_close(x, y, msg=f"{layout}, {unpad}, {rows}", **close)
            assert rows == "hf" or not x[~valid].any() or x.shape[-1] != model.config.hidden_size, layout
    model.set_unpad(True)
    expected = [flat(x) for x in alone(model, inputs, False, **options)]
    outputs = flat(model.forward_packed(**packed_of(inputs), **options))
    tokens = torch.cat([valid[row, start:stop] for row, start, stop in spans_of(inputs)])
    for x, *pieces in zip(outputs, *expected, strict=True):
        torch.testing.assert_close(x[tokens], torch.cat(pieces, 1)[0, tokens], msg=f"{layout}, packed", **close)


CASES = {name: (name, "Model", {}) for name in CONFIGS if name != "v1-talking-heads"} | {
    "v2-conv-kernel-7": ("v2", "Model", dict(conv_kernel_size=7, num_hidden_layers=1)),
    "v3-conv-kernel-1": ("v3-conv", "Model", dict(conv_kernel_size=1, num_hidden_layers=1)),
    "v2-z-steps": ("v2", "Model", dict(z_steps=2)),
    "v1-language-model": ("v1", "ForMaskedLM", {}),
    "v3-mask-decoder": ("v3", "ForMaskedLM", EMD),
    "v3-mask-decoder-z-steps": ("v3", "ForMaskedLM", EMD | dict(z_steps=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_sequence_is_as_if_alone(case):
    name, head, changes = CASES[case]
    model = build(name, head, **changes).double()
    model.set_backend("eager")
    with torch.no_grad():
        for layout in LAYOUTS:
            assert_as_alone(model, batch_of(layout), 1e-9, layout)


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "v3-conv"])
def test_every_sequence_is_as_if_alone_in_float32(name):
    model = build(name)
    for layout in ("holes", "empty rows", "single tokens"):
        assert_as_alone(model, batch_of(layout), 2e-5, layout)
        with torch.no_grad():
            assert_as_alone(model, batch_of(layout, 2), 2e-5, layout)


def test_a_batch_without_any_token():
    inputs = batch_of([(0, 0), (0, 0)])
    for name in ("v1", "v2", "v3"):
        model = build(name)
        model.set_unpad(True)
        output = model(**inputs).last_hidden_state
        assert output.shape == (2, LENGTH, 32) and torch.isfinite(output).all()
        output.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_layers_see_tokens_alone():
    model, inputs = build("v2"), batch_of("holes")
    seen = shapes_seen(model)
    for unpad, rows, shape in (
        (True, "hf", (75, 32)),  # the tokens, and one row of padding for each of two sequences
        ("auto", "hf", (75, 32)),
        (True, "zeros", (73, 32)),
        (False, "hf", (3, LENGTH, 32)),
    ):
        model.set_unpad(unpad, rows)
        model(**inputs)
        assert seen == [shape] * 2
        seen.clear()
    model.set_unpad(True)
    model(**batch_of([(0, 37), (0, 35)]))
    assert seen == [(73, 32)] * 2
    seen.clear()
    model.set_unpad("auto")
    model(**batch_of("full"))
    model(inputs["input_ids"])
    assert {x[1:] for x in seen} == {(LENGTH, 32)}
    assert build("v3").encoder.unpadding.mode == "auto"


def test_kinds_of_token_masks():
    model, inputs = build("v2"), batch_of("both sides")
    model.set_unpad(True)
    seen, mask = shapes_seen(model), inputs["attention_mask"]
    expected = model(**inputs)[0]
    for other in (mask.bool(), mask.float(), 3 * mask, mask[:, None, None]):
        assert torch.equal(model(**{**inputs, "attention_mask": other})[0], expected)
    assert set(seen) == {(27 + 10 + 9, 32)}


def messages_of(model, inputs, times=2, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            output = model(**inputs, **options)
    return output, [str(x.message) for x in caught if "padding stays" in str(x.message)]


PADDING_STAYS = {
    "pairs": ("v2", lambda mask: {"attention_mask": mask[:, :, None] * mask[:, None]}, "mask of pairs"),
    "pairs-4d": ("v3", lambda mask: {"attention_mask": (mask[:, :, None] * mask[:, None])[:, None]}, "mask of pairs"),
    "attentions": ("v1", lambda mask: {"output_attentions": True}, "output_attentions"),
    "talking-heads": ("v1-talking-heads", lambda mask: {}, "talking heads"),
}


@pytest.mark.parametrize("case", PADDING_STAYS)
def test_where_padding_stays(case):
    name, changed, reason = PADDING_STAYS[case]
    model, inputs = build(name), batch_of("right")
    inputs |= changed(inputs["attention_mask"]) | {"output_hidden_states": True}
    model.set_unpad(False)
    expected, silence = messages_of(model, inputs)
    assert not silence
    seen = shapes_seen(model)
    for unpad, count in (("auto", 0), (True, 1)):
        model.set_unpad(unpad)
        got, messages = messages_of(model, inputs)
        assert len(messages) == count and all(reason in x for x in messages)
        assert all(torch.equal(x, y) for x, y in zip(flat(got), flat(expected), strict=True))
    assert set(seen) == {(3, LENGTH, 32)}


def test_tuples_and_hidden_states():
    model, inputs = build("v2", z_steps=2), batch_of("holes")
    model.set_unpad(True)
    named = model(**inputs, output_hidden_states=True)
    states, hidden_states = model(**inputs, output_hidden_states=True, return_dict=False)
    assert len(hidden_states) == 4 and all(x.shape == (3, LENGTH, 32) for x in hidden_states)
    assert all(torch.equal(x, y) for x, y in zip([states, *hidden_states], flat(named), strict=True))
    assert list(model(**inputs)) == ["last_hidden_state"] and len(model(**inputs, return_dict=False)) == 1
    packed = packed_of(inputs)
    states, hidden_states = model.forward_packed(**packed, output_hidden_states=True, return_dict=False)
    assert states.shape == (73, 32) and len(hidden_states) == 4 and torch.equal(states, hidden_states[-1])
    assert list(model.forward_packed(**packed)) == ["last_hidden_state"]
    model.config.output_hidden_states, model.config.return_dict = True, False
    assert len(model.forward_packed(**packed)[1]) == 4


# Neighbours

NEIGHBOURS = [1, 3, 12, 2, 1, 18]
TWO_WAYS = pytest.mark.parametrize("way", ["padded", "packed"])


def neighbours(way, values):
    """Arguments of six sequences, and a function that cuts the output. ``values`` (T, ...): ids or embeddings."""
    pieces = values.split(NEIGHBOURS)
    key = "input_ids" if values.dim() == 1 else "inputs_embeds"
    if way == "packed":
        cu_seqlens = torch.tensor([0, *NEIGHBOURS]).cumsum(0).int()
        return {key: values, "cu_seqlens": cu_seqlens}, lambda output: output.split(NEIGHBOURS)
    mask = torch.stack([F.pad(torch.ones(n), (9, 9 + 18 - n)) for n in NEIGHBOURS])
    values = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    values = F.pad(values, (9, 9) if values.dim() == 2 else (0, 0, 9, 9))
    return {key: values, "attention_mask": mask}, lambda output: [x[9 : 9 + n] for x, n in zip(output, NEIGHBOURS)]


@TWO_WAYS
@pytest.mark.parametrize("name", ["v1", "v2", "v3", "v3-conv"])
def test_neighbours_do_not_touch(name, way):
    model = build(name)
    model.set_unpad(True)
    run = model if way == "padded" else model.forward_packed

    def states(values):
        inputs, split = neighbours(way, values)
        return split(run(**inputs).last_hidden_state)

    ids = torch.randint(1, 69, (sum(NEIGHBOURS),), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = states(ids)
        for changed in range(len(NEIGHBOURS)):
            others = [x + (place == changed) for place, x in enumerate(ids.split(NEIGHBOURS))]
            for place, (x, y) in enumerate(zip(states(torch.cat(others)), expected)):
                assert torch.equal(x, y) == (place != changed), (changed, place)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    outputs = states(embeddings)
    for place, output in enumerate(outputs):
        (gradient,) = torch.autograd.grad(output.square().sum() + output[:, 0].sum(), embeddings, retain_graph=True)
        for other, x in enumerate(gradient.split(NEIGHBOURS)):
            assert x.ne(0).any(1).all() if other == place else not x.any(), (place, other)


# Training


def weighted(states):
    """A loss of the states of valid tokens, (n, hidden_size)."""
    return (states * torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype)).square().sum()


def loss_padded(model, inputs):
    return weighted(model(**inputs).last_hidden_state[inputs["attention_mask"].bool()])


def loss_packed(model, inputs):
    packed = packed_of(inputs)
    seen = packed.get("attention_mask", torch.ones_like(packed["input_ids"])).bool()
    return weighted(model.forward_packed(**packed).last_hidden_state[seen])


@pytest.mark.parametrize("layout", ["left", "holes", "empty rows"])
@pytest.mark.parametrize("name", ["v1", "v2", "v2-c2p-narrow-embeddings", "v3", "v3-conv"])
def test_gradients_of_all_parameters(name, layout):
    model, inputs = build(name, position_biased_input=False).train(), batch_of(layout)
    exact = copy.deepcopy(model).double()
    exact.set_backend("eager")
    seen = [inputs["attention_mask"][row : row + 1, start:stop].bool() for row, start, stop in spans_of(inputs)]
    outputs = alone(exact, inputs, False)
    loss = sum(weighted(x.last_hidden_state[mask]) for x, mask in zip(outputs, seen, strict=True))
    expected = gradients_of(exact, loss)
    exact.set_unpad(True)
    assert_same_gradients(gradients_of(exact, loss_padded(exact, inputs)), expected, 1e-9)
    assert_same_gradients(gradients_of(exact, loss_packed(exact, inputs)), expected, 1e-9)
    model.set_unpad(False)
    padded = gradients_of(model, loss_padded(model, inputs))
    model.set_unpad(True)
    assert_same_gradients(gradients_of(model, loss_padded(model, inputs)), padded, 1e-4)
    assert_same_gradients(gradients_of(model, loss_packed(model, inputs)), padded, 1e-4)


DROPPED = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)


@pytest.mark.parametrize("dropout", [{}, DROPPED], ids=["exact", "dropout"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["v1", "v3-conv"])
def test_gradient_checkpointing(name, reentrant, dropout):
    model, inputs = build(name, **dropout).double().train(), batch_of("holes")
    model.set_unpad(True)
    seen, runs = shapes_seen(model), []
    for loss in (loss_padded, loss_packed):
        torch.manual_seed(0)
        model.gradient_checkpointing_disable()
        expected = gradients_of(model, loss(model, inputs))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        seen.clear()
        torch.manual_seed(0)
        assert_same_gradients(gradients_of(model, loss(model, inputs)), expected, 1e-10)
        runs.append(len(seen))
        assert set(seen) == {(75 if loss is loss_padded else 73, 32)}
    assert runs == [2 * model.config.num_hidden_layers] * 2


@names
def test_trains_with_dropout(name):
    model, inputs = build(name, "ForSequenceClassification", **DROPPED).train(), packed_of(batch_of("right"))
    labels, optimizer = torch.tensor([0, 1, 0]), torch.optim.SGD(model.parameters(), lr=0.02)
    run = lambda: model.forward_packed(**inputs, labels=labels)
    torch.manual_seed(3)
    first, other = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run().logits, first.logits) and not torch.equal(first.logits, other.logits)
    losses = []
    for _ in range(20):
        loss = run().loss
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@TWO_WAYS
def test_dropout_has_the_statistics_of_padded_dropout(way):
    model = build("v3", num_hidden_layers=1, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.05).train()
    inputs = batch_of([(0, 9), (3, 15), (0, 4)])
    valid = inputs["attention_mask"].bool()

    def samples(run):
        torch.manual_seed(1)
        with torch.no_grad():
            return torch.stack([run() for _ in range(250)]).double()

    model.set_unpad(False)
    padded = samples(lambda: model(**inputs).last_hidden_state[valid])
    model.set_unpad(True)
    packed = packed_of(inputs)
    runs = {
        "padded": lambda: model(**inputs).last_hidden_state[valid],
        "packed": lambda: model.forward_packed(**packed).last_hidden_state,
    }
    got = samples(runs[way])
    z = (got.mean(0) - padded.mean(0)) / ((got.var(0) + padded.var(0)) / 250).sqrt()
    assert 0.75 < z.square().mean() < 1.3 and z.abs().max() < 6
    assert 0.93 < got.var(0).mean() / padded.var(0).mean() < 1.07


def test_equal_sequences_are_dropped_differently():
    model = build("v3", num_hidden_layers=1, attention_probs_dropout_prob=0.3).train()
    ids = torch.arange(1, 12).repeat(3)
    outputs = model.forward_packed(ids, torch.tensor([0, 11, 22, 33], dtype=torch.int32))[0].split(11)
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


@TWO_WAYS
@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
@names
def test_bfloat16(name, kind, way):
    model, inputs = build(name, position_biased_input=False), batch_of("holes")
    loss = loss_packed if way == "packed" else loss_padded
    dtype = torch.float32 if kind == "autocast" else torch.bfloat16
    model.set_unpad(False)
    exact = gradients_of(model, loss_padded(model, inputs))
    error = {}
    for unpad, run in ((False, loss_padded), (True, loss)):
        other = copy.deepcopy(model).train().to(dtype)
        other.set_unpad(unpad)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            value = run(other, inputs)
        got = gradients_of(other, value)
        assert {x.dtype for x in got.values() if x is not None} == {dtype}
        largest = max(x.norm() for x in exact.values() if x is not None)
        errors = [
            (got[key].float() - x).norm() / max(x.norm(), 1e-2 * largest) for key, x in exact.items() if x is not None
        ]
        error[unpad] = torch.stack(errors).mean()
    assert 0 < error[True] < 1.3 * error[False] < 0.05


# Other uses of a model


def test_values_of_unpad():
    model, inputs = build("v3", "ForTokenClassification"), batch_of("right")
    state = {key: x.clone() for key, x in model.state_dict().items()}
    for wrong in ("yes", 1, 0, None, "True"):
        with pytest.raises(ValueError, match=f'unpad must be False, "auto" or True, got {wrong!r}'):
            model.set_unpad(wrong)
    model.set_unpad(True)
    model(**inputs)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies(copied):
    model, inputs = build("v2"), batch_of("left")
    model.set_unpad(True)
    twin = copied(model)
    seen, expected = shapes_seen(twin), model(**inputs)[0]
    assert torch.equal(twin(**inputs)[0], expected) and set(seen) == {(71, 32)}
    packed = packed_of(inputs)
    assert torch.equal(twin.forward_packed(**packed)[0], model.forward_packed(**packed)[0])
    for p in twin.parameters():
        p.data.zero_()
    assert not torch.equal(twin(**inputs)[0], expected) and torch.equal(model(**inputs)[0], expected)


def test_compiled_models_keep_their_padding():
    torch._dynamo.reset()
    model, inputs = build("v3"), batch_of("holes")
    model.set_unpad(True)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0]
        torch.testing.assert_close(
            got[inputs["attention_mask"].bool()], model(**inputs)[0][inputs["attention_mask"].bool()]
        )
        model.set_unpad(False)
        assert got.any(-1).all()
        torch.testing.assert_close(got, model(**inputs)[0])


@pytest.mark.parametrize("unpad", [False, True])
def test_classifiers_behind_left_padding(unpad):
    """If padding comes out as zeros, they read the first token; otherwise the first row, as Hugging Face's do."""
    model, inputs = build("v3", "ForSequenceClassification"), tokens("left")
    model.set_unpad(unpad, "zeros")
    got = model(**inputs).logits
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = {key: x[row : row + 1, mask] for key, x in inputs.items()}
        torch.testing.assert_close(got[row : row + 1], model(**alone).logits, atol=1e-5, rtol=1e-5)
    model.set_unpad(unpad)
    first = model.deberta(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(model(**inputs).logits, model.classifier(model.pooler(first)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(**inputs).logits, got)
