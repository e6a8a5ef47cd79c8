"""forward_packed: texts one after the other, without padding, through the models and their heads."""

import inspect

import pytest
import torch
from native_models import EMD, build, heads, names
from packed_batches import LENGTH, assert_same_gradients, batch_of, gradients_of, packed_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from deberta_fast.models import packing

IDS, ENDS = torch.ones(8, dtype=torch.long), torch.tensor([0, 3, 8], dtype=torch.int32)
STATES = torch.ones(1, 8, 32)


@heads
def test_heads(name, head):
    model = build(name, head, position_biased_input=False, num_labels=3, **(EMD if head == "ForMaskedLM" else {}))
    layout = [(0, 37), (0, 11), (0, 24), (0, 1), (0, 30, 5, 6), (0, 12)]
    inputs, options = batch_of(layout), {}
    packed, padded = packed_of(inputs), dict(inputs)
    within = torch.cat([torch.arange(LENGTH) < stop for _, stop, *_ in layout])
    if head in ("ForMaskedLM", "ForTokenClassification"):
        padded["labels"] = (inputs["input_ids"] % 3).where(inputs["attention_mask"].bool(), -100)
        packed["labels"] = padded["labels"].flatten()[within]
    elif head == "ForSequenceClassification":
        padded["labels"] = packed["labels"] = torch.tensor([0, 1, 2, 1, 0, 2])
    elif head == "ForMultipleChoice":
        padded = {key: x.unflatten(0, (2, 3)) for key, x in padded.items()}
        padded["labels"] = packed["labels"] = torch.tensor([2, 1])
        options["choices"] = 3
    model.set_unpad(False, "zeros")  # packed sequences have no padding that a loss could read
    expected = model(**padded, output_hidden_states=True)
    tokens = inputs["attention_mask"].bool().flatten()
    of_tokens = tokens[within]
    for longest in ({}, {"max_seqlen": 37}, {"max_seqlen": 50}):
        got = model.forward_packed(**packed, **options, **longest, output_hidden_states=True)
        assert list(got) == list(expected) and type(got) is type(expected)
        for key in set(expected) - {"hidden_states"}:
            y = expected[key]
            x, y = (got[key][of_tokens], y.flatten(0, 1)[tokens]) if y.shape[:2] == (6, LENGTH) else (got[key], y)
            torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5, msg=key)
        for x, y in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(x[of_tokens], y.flatten(0, 1)[tokens], atol=2e-5, rtol=2e-5)
    bare = model.forward_packed(**{key: x for key, x in packed.items() if key != "labels"}, **options)
    assert list(bare) == [key for key in expected if key not in ("loss", "hidden_states")]
    as_tuple = model.forward_packed(**packed, **options, return_dict=False)
    assert type(as_tuple) is tuple and len(as_tuple) == len(expected) - 1


@heads
def test_forward_takes_them_itself(name, head):
    """``forward`` takes packed sequences, so wrappers, compilers and hooks of model and encoder see the call."""
    model, inputs = build(name, head, num_labels=3), packed_of(batch_of([(0, 37), (4, 11)]))
    inputs |= {"max_seqlen": 37} | ({"choices": 2} if head == "ForMultipleChoice" else {})
    expected = model.forward_packed(**inputs)
    seen = []
    for module in {model, model.base_model}:
        module.register_forward_hook(lambda *_: seen.append(1))
    for got in (model(**inputs), model.forward_packed(**inputs)):
        assert all(torch.equal(x, y) for x, y in zip(got.to_tuple(), expected.to_tuple(), strict=True))
    assert len(seen) == (2 if head == "Model" else 4)
    parameters = list(inspect.signature(model.forward).parameters)
    options = ["output_attentions", "output_hidden_states", "return_dict"]
    assert parameters[: parameters.index("cu_seqlens")][-3:] == options  # where they were before


BATCH = torch.ones(1, 8, dtype=torch.long)
MIXED = {
    "batch": (dict(input_ids=BATCH), r"input_ids must be of shape \(T,\) .* got \(1, 8\)"),
    "no-ends": (dict(cu_seqlens=None), r"input_ids must be of shape \(B, L\).* need cu_seqlens"),
    "longest-of-a-batch": (dict(input_ids=BATCH, cu_seqlens=None, max_seqlen=8), "max_seqlen=8 and no cu_seqlens"),
    "attentions": (dict(output_attentions=True), "output_attentions must be False with cu_seqlens"),
    "mask-of-pairs": (dict(attention_mask=torch.ones(8, 8)), r"attention_mask must be of shape \(8,\), got \(8, 8\)"),
}


@pytest.mark.parametrize("changed, message", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"])
def test_what_is_neither_a_batch_nor_packed_is_refused(head, changed, message):
    with pytest.raises(ValueError, match=message):
        build("v3", head)(**{"input_ids": IDS, "cu_seqlens": ENDS, **changed})


def test_choices_are_of_packed_sequences():
    model = build("v3", "ForMultipleChoice")
    with pytest.raises(ValueError, match="choices must divide the number of sequences, 2, got None"):
        model(IDS, cu_seqlens=ENDS)
    with pytest.raises(ValueError, match="choices=2 and no cu_seqlens"):
        model(IDS.view(1, 2, 4), choices=2)
    with pytest.raises(ValueError, match=r"input_ids must be of shape \(B, C, L\), got \(2, 4\)"):
        model(IDS.view(2, 4))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        build("v3", output_attentions=True)(IDS, cu_seqlens=ENDS)


def test_answers_are_counted_in_their_own_sequence():
    """The loss is a cross entropy over each sequence's tokens. Positions outside and empty sequences do not count."""
    model, inputs = build("v1", "ForQuestionAnswering"), packed_of(batch_of([(0, 9), (0, 0), (5, 37), (0, 1), (3, 20)]))
    starts, ends = torch.tensor([0, 0, 31, 0, 17]), torch.tensor([8, 3, 32, 0, 16])
    bare = model.forward_packed(**inputs)
    cuts = [9, 0, 32, 1, 17]
    by_hand = []
    for logits, positions in ((bare.start_logits, starts), (bare.end_logits, ends)):
        pairs = [(x, p) for x, p, n in zip(logits.split(cuts), positions, cuts) if p < n]
        by_hand.append(sum(F.cross_entropy(x[None], p[None]) for x, p in pairs) / len(pairs))
    expected = (by_hand[0] + by_hand[1]) / 2
    for longest in ({}, {"max_seqlen": 32}, {"max_seqlen": 45}):
        for shape in ((5,), (5, 1)):
            got = model.forward_packed(
                **inputs, **longest, start_positions=starts.view(shape), end_positions=ends.view(shape)
            )
            torch.testing.assert_close(got.loss, expected)
            torch.testing.assert_close(got.start_logits, bare.start_logits)
    model.zero_grad()
    got.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMultipleChoice"])
def test_an_empty_sequence_pools_zeros(head):
    model = build("v3", head)
    inputs = packed_of(batch_of([(0, 0), (0, 5), (0, 0), (0, 0), (4, 9), (0, 0)]))
    got = model.forward_packed(**inputs, **({"choices": 1} if head == "ForMultipleChoice" else {})).logits
    nothing = model.classifier(model.pooler(torch.zeros(1, 32)))
    for row in (0, 2, 3, 5):
        torch.testing.assert_close(got[row], nothing[0])
    for row, (key, start) in {1: ("first", 0), 4: ("second", 5)}.items():
        states = model.deberta.forward_packed(**inputs).last_hidden_state[start]
        torch.testing.assert_close(got[row], model.classifier(model.pooler(states)), msg=key)


@names
def test_embeddings_and_positions_may_be_given(name):
    model, inputs = build(name, position_biased_input=True), packed_of(batch_of("both sides"))
    expected = model.forward_packed(**inputs)[0]
    positions = torch.cat([torch.arange(n) for n in inputs["cu_seqlens"].diff()])
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids)
    for given in ({"input_ids": ids}, {"inputs_embeds": embeddings}):
        assert torch.equal(model.forward_packed(**inputs, **given, position_ids=positions)[0], expected)
        shifted = model.forward_packed(**inputs, **given, position_ids=positions + 3)[0]
        assert (shifted - expected).abs().max() > 1e-2
    assert torch.equal(model.forward_packed(**inputs, inputs_embeds=embeddings)[0], expected)


BAD_CALLS = {
    "int64": (dict(cu_seqlens=ENDS.long()), "cu_seqlens must be an int32 tensor"),
    "list": (dict(cu_seqlens=[0, 3, 8]), "cu_seqlens must be an int32 tensor"),
    "no-ends": (dict(cu_seqlens=None), "cu_seqlens must be an int32 tensor"),
    "one-end": (dict(cu_seqlens=ENDS[:1]), "cu_seqlens .* from 0 to 8"),
    "matrix": (dict(cu_seqlens=ENDS[None]), "cu_seqlens must be one-dimensional"),
    "falling": (dict(cu_seqlens=ENDS.new_tensor([0, 5, 3, 8])), r"cu_seqlens .*\[0, 5, 3, 8\]"),
    "from-1": (dict(cu_seqlens=ENDS.new_tensor([1, 3, 8])), "cu_seqlens .* from 0 to 8"),
    "to-7": (dict(cu_seqlens=ENDS.new_tensor([0, 3, 7])), "cu_seqlens .* from 0 to 8"),
    "to-9": (dict(cu_seqlens=ENDS.new_tensor([0, 3, 9])), "cu_seqlens .* from 0 to 8"),
    "longest": (dict(max_seqlen=4), "max_seqlen=4"),
    "longest-float": (dict(max_seqlen=5.0), "max_seqlen"),
    "longest-text": (dict(max_seqlen="5"), "max_seqlen"),
    "ids-2d": (dict(input_ids=IDS[None]), r"input_ids must be of shape \(T,\) .* got \(1, 8\)"),
    "no-ids": (dict(input_ids=IDS[:0]), r"input_ids must be of shape \(T,\) .* got \(0,\)"),
    "embeddings-3d": (
        dict(input_ids=None, inputs_embeds=STATES),
        r"inputs_embeds must be of shape \(T, embedding_size\) .* got \(1, 8, 32\)",
    ),
    "mask": (dict(attention_mask=IDS[1:]), r"attention_mask must be of shape \(8,\), got \(7,\)"),
    "mask-2d": (dict(attention_mask=IDS[None]), r"attention_mask must be of shape \(8,\), got \(1, 8\)"),
    "types": (dict(token_type_ids=IDS[None]), r"token_type_ids must be of shape \(8,\), got \(1, 8\)"),
    "positions": (dict(position_ids=IDS[1:]), r"position_ids must be of shape \(8,\), got \(7,\)"),
    "neither": (dict(input_ids=None), "exactly one of input_ids and inputs_embeds"),
    "both": (dict(inputs_embeds=STATES[0]), "exactly one of input_ids and inputs_embeds"),
    "too-long": (
        dict(input_ids=IDS.repeat(9), cu_seqlens=ENDS.new_tensor([0, 7, 72])),
        "max_position_embeddings=64 tokens long .* got 65",
    ),
}


@pytest.mark.parametrize("changed, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused(changed, message):
    model = build("v2", "ForTokenClassification")
    for run in (model.forward_packed, model.deberta.forward_packed):
        with pytest.raises((TypeError, ValueError), match=message):
            run(**{"input_ids": IDS, "cu_seqlens": ENDS, **changed})


LONG = dict(input_ids=IDS.repeat(9), cu_seqlens=ENDS.new_tensor([0, 72]))
BAD_HEADS = {
    "choices": ("ForMultipleChoice", dict(choices=3), "choices must divide the number of sequences, 2, got 3"),
    "no-choices": ("ForMultipleChoice", dict(choices=0), "choices must divide the number of sequences, 2, got 0"),
    "words": ("ForMaskedLM", dict(labels=IDS[:2]), r"labels must be of shape \(8,\), got \(2,\)"),
    "tokens": ("ForTokenClassification", dict(labels=IDS[None]), r"labels must be of shape \(8,\), got \(1, 8\)"),
    "classes": (
        "ForSequenceClassification",
        dict(labels=IDS),
        r"labels must be of shape \(2, 2\) or \(2,\), got \(8,\)",
    ),
    "one-answer-of-two": ("ForQuestionAnswering", dict(start_positions=IDS[:1], end_positions=IDS[:1]), "_positions"),
    "answers": ("ForQuestionAnswering", dict(start_positions=IDS[:3], end_positions=IDS[:3]), "_positions"),
    "decoder": ("ForMaskedLM", LONG, "max_position_embeddings=64 tokens long .* got 72"),
}


@pytest.mark.parametrize("head, changed, message", BAD_HEADS.values(), ids=BAD_HEADS)
def test_bad_calls_of_heads_are_refused(head, changed, message):
    model = build("v3", head, **(EMD if head == "ForMaskedLM" else {}))
    with pytest.raises(ValueError, match=message):
        model.forward_packed(**{"input_ids": IDS, "cu_seqlens": ENDS, **changed})


def test_what_packed_sequences_may_and_may_not_be():
    with pytest.raises(ValueError, match="talking heads"):
        build("v1-talking-heads").forward_packed(IDS, ENDS)
    # v3 adds no absolute positions, and relative ones reach any length
    assert build("v3").forward_packed(**LONG)[0].shape == (72, 32)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForQuestionAnswering", "ForSequenceClassification"])
def test_sequences_are_checked_once(head, monkeypatch):
    """The packing checks them when it is built; neither a layer nor a head checks the values again."""
    checks, layers = [], []
    check, run = packing.check_cu_seqlens_form, packing.disentangled_attention_varlen
    monkeypatch.setattr(packing, "check_cu_seqlens_form", lambda *given: checks.append(check(*given)))
    monkeypatch.setattr(
        packing, "disentangled_attention_varlen", lambda *heads, **rest: layers.append(rest) or run(*heads, **rest)
    )
    positions = dict(start_positions=IDS[:2], end_positions=IDS[:2]) if head == "ForQuestionAnswering" else {}
    build("v3", head, **(EMD if head == "ForMaskedLM" else {})).forward_packed(IDS, ENDS, **positions)
    assert len(checks) == 1 and len(layers) == (3 if head == "ForMaskedLM" else 2)  # of 2 layers, the last twice
    assert not any(x["check_values"] for x in layers)


def test_masked_tokens_anywhere():
    """Masked tokens may also be at a sequence's ends, and in one sequence all tokens are masked."""
    model, mask = build("v3-conv").double(), torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1])
    model.set_unpad(False)
    model.set_backend("eager")
    ids, cuts = torch.arange(1, 13), [5, 3, 3, 1]
    got = model.forward_packed(ids, torch.tensor([0, 5, 8, 11, 12], dtype=torch.int32), attention_mask=mask)[0]
    for x, one, seen in zip(got.split(cuts), ids.split(cuts), mask.split(cuts), strict=True):
        expected = model(one[None], attention_mask=seen[None])[0][0]
        torch.testing.assert_close(x[seen.bool()], expected[seen.bool()], rtol=0, atol=1e-10)
    got.sum().backward()
    assert all(torch.isfinite(x).all() for x in [got, *(p.grad for p in model.parameters() if p.grad is not None)])


@pytest.mark.parametrize("name, head", [("v2", "ForSequenceClassification"), ("v3", "ForTokenClassification")])
def test_forward_packed_compiles_once_for_all_lengths(name, head):
    torch._dynamo.reset()
    model, counter = build(name, head, num_hidden_layers=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.forward_packed, backend=counter, fullgraph=True, dynamic=True)
    for layout in ([(0, 37), (3, 20)], [(0, 9), (1, 4), (0, 30)], [(0, 5), (0, 0), (0, 17), (0, 6)]):
        inputs = packed_of(batch_of(layout))
        inputs["max_seqlen"] = int(inputs["cu_seqlens"].diff().max())
        shape = inputs["input_ids"].shape[0] if head == "ForTokenClassification" else len(layout)
        inputs["labels"] = torch.arange(shape) % 2
        expected = model.forward_packed(**inputs)
        gradients = gradients_of(model, expected.loss)
        got = compiled(**inputs)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
        assert_same_gradients(gradients_of(model, got.loss), gradients, 1e-4)
    assert counter.frame_count <= 2


def test_compiled_forward_packed_asks_for_the_longest():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="max_seqlen must be given"):
        torch.compile(build("v3").forward_packed, backend="eager", fullgraph=True)(IDS, ENDS)
