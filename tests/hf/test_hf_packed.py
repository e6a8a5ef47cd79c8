"""Packed sequences through patched models: every token gets the result of the padded batch in Hugging Face's models."""

import copy
import inspect
import pickle

import pytest
import torch
from hf_models import build
from packed_batches import LENGTH, batch_of, gradients_of, packed_of, shapes_seen
from torch.nn.parallel import DistributedDataParallel

from deberta_fast import patch, unpatch

pytestmark = pytest.mark.usefixtures("exact_hf")
LAYOUT = [(0, 37), (0, 11), (0, 24), (0, 5), (0, 30, 4, 9), (0, 1)]
WITHIN = torch.cat([torch.arange(LENGTH) < stop for _, stop, *_ in LAYOUT])


def batches_of(head):
    """The arguments of a padded batch and of the same sequences packed."""
    inputs = batch_of(LAYOUT)
    padded, packed = dict(inputs), packed_of(inputs) | {"max_seqlen": LENGTH}
    if head in ("ForMaskedLM", "ForTokenClassification"):
        padded["labels"] = (inputs["input_ids"] % 2).where(inputs["attention_mask"].bool(), -100)
        packed["labels"] = padded["labels"].flatten()[WITHIN]
    elif head == "ForSequenceClassification":
        padded["labels"] = packed["labels"] = torch.tensor([0, 1, 1, 1, 0, 0])
    elif head == "ForQuestionAnswering":
        ends = dict(start_positions=torch.tensor([3, 0, 20, 1, 2, 0]), end_positions=torch.tensor([36, 4, 23, 4, 7, 0]))
        padded, packed = padded | ends, packed | ends
    elif head == "ForMultipleChoice":
        padded = {key: x.unflatten(0, (2, 3)) for key, x in padded.items()}
        padded["labels"] = packed["labels"] = torch.tensor([2, 1])
        packed["choices"] = 3
    return padded, packed


HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
CASES = [(name, head) for name in ("v1", "v2", "v3") for head in HEADS] + [("v3", "ForMultipleChoice")]


@pytest.mark.parametrize("name, head", CASES)
def test_outputs_losses_and_gradients(name, head):
    model, (padded, packed) = build(name, head).double(), batches_of(head)
    expected = unpatch(model)(**padded, output_hidden_states=True)
    loss = lambda output: output.loss if "loss" in output else output[0].square().sum()
    kept = lambda x: x.flatten(0, 1)[WITHIN] if x.shape[:2] == (6, LENGTH) else x
    for options in ({}, {"unpad": True}, {"padding_rows": "zeros"}):
        got = patch(model, **options)(**packed, output_hidden_states=True)
        assert list(got) == list(expected) and type(got) is type(expected)
        if options.get("padding_rows") == "zeros":
            continue  # rows of holes, and losses that read padding, differ with zeros
        for key in expected.keys() - {"hidden_states"}:
            torch.testing.assert_close(got[key], kept(expected[key]), rtol=0, atol=1e-9, msg=key)
        for x, y in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(x, kept(y), rtol=0, atol=1e-9)
        if head == "Model":
            continue  # the sum over tokens is not the sum over the padded batch
        gradients, expected_gradients = gradients_of(model, loss(got)), None
        unpatch(model)
        expected_gradients = gradients_of(model, loss(model(**padded)))
        for key, y in expected_gradients.items():
            assert (gradients[key] is None) == (y is None), key
            if y is not None:
                torch.testing.assert_close(gradients[key], y, rtol=0, atol=1e-8, msg=key)
    assert type(patch(model)(**packed, return_dict=False)) is tuple


def test_layers_see_tokens():
    model, (padded, packed) = patch(build("v3")), batches_of("Model")
    seen = shapes_seen(model)
    model(**packed)
    rows = int(WITHIN.sum()) + 5  # one row of padding for each of five sequences
    assert seen == [(rows, 64)] * 2
    seen.clear()
    model(**padded)
    assert seen == [(6, LENGTH, 64)] * 2


def test_embeddings_positions_and_lengths():
    model, (_, packed) = patch(build("v1").double()), batches_of("Model")
    expected, seen = model(**packed)[0], packed["attention_mask"].bool()
    positions = torch.cat([torch.arange(stop) for _, stop, *_ in LAYOUT])
    ids = packed.pop("input_ids")
    for changes in ({"max_seqlen": None}, {"max_seqlen": 50}, {"position_ids": positions}):
        got = model(ids, **packed | changes)[0]
        torch.testing.assert_close(got[seen], expected[seen], rtol=0, atol=1e-12)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings, **packed)[0], expected, rtol=0, atol=1e-12)


IDS, ENDS = torch.ones(8, dtype=torch.long), torch.tensor([0, 3, 8], dtype=torch.int32)
WRONG = {
    "batch": (dict(input_ids=IDS[None]), r"input_ids must be of shape \(T,\) with T at least 1, got \(1, 8\)"),
    "ends": (dict(cu_seqlens=ENDS - 1), "cu_seqlens must rise from 0 to 8"),
    "longest": (dict(max_seqlen=4), "max_seqlen=4"),
    "longest of a batch": (dict(input_ids=IDS[None], cu_seqlens=None, max_seqlen=8), "max_seqlen=8 and no cu_seqlens"),
    "attentions": (dict(output_attentions=True), "output_attentions must be False with cu_seqlens"),
    "types": (dict(token_type_ids=IDS[:3]), r"token_type_ids must be of shape \(8,\), got \(3,\)"),
    "mask": (dict(attention_mask=IDS[:3]), r"attention_mask must be of shape \(8,\), got \(3,\)"),
    "both": (dict(inputs_embeds=torch.ones(8, 64)), "exactly one of input_ids and inputs_embeds"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        patch(build("v3"))(**{"input_ids": IDS, "cu_seqlens": ENDS, **changes})
    with pytest.raises(ValueError, match="choices must divide the number of sequences, 2, got None"):
        patch(build("v3", "ForMultipleChoice"))(IDS, cu_seqlens=ENDS)
    with pytest.raises(ValueError, match="choices"):
        patch(build("v3", "ForSequenceClassification"))(IDS, cu_seqlens=ENDS, choices=2)


def test_wrappers_signatures_and_copies():
    model, (_, packed) = build("v3", "ForSequenceClassification").double(), batches_of("ForSequenceClassification")
    own = list(inspect.signature(model.forward).parameters)
    expected = patch(model)(**packed).logits
    names = list(inspect.signature(model.forward).parameters)
    assert set(names) - set(own) == {"cu_seqlens", "max_seqlen"} and [x for x in names if x in own] == own
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**packed).logits, expected)
        for p in model.parameters():
            p.data.add_(0)
        unpatch(other)
        assert list(inspect.signature(other.forward).parameters) == own
    replaced, model.forward = model.forward, lambda *args, **keywords: replaced(*args, **keywords)  # as accelerate does
    assert torch.equal(model(**packed).logits, expected)
    padded, _ = batches_of("ForSequenceClassification")
    unpatch(model)
    assert model(**padded).logits.shape == (6, 2)


def test_distributed(tmp_path):
    """The wrapper's hooks reduce the gradients of packed sequences. The test runs it in one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, (_, packed) = patch(build("v3", "ForSequenceClassification")), batches_of("ForSequenceClassification")
        expected = gradients_of(model, model(**packed).loss)
        wrapped, reduced = DistributedDataParallel(model, find_unused_parameters=True), []
        wrapped.register_comm_hook(reduced, counting)
        got = gradients_of(model, wrapped(**packed).loss)
        assert reduced
        for key, x in expected.items():
            assert x is None or torch.allclose(got[key], x, atol=1e-6), key
    finally:
        torch.distributed.destroy_process_group()


def counting(reduced, bucket):
    reduced.append(bucket)
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
