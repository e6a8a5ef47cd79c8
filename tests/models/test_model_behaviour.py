"""Behaviour of the models that users rely on, besides their numbers: outputs, training, masks."""

import copy
import pickle
import warnings

import pytest
import torch
from native_models import (
    EMD,
    LENGTH,
    NAMES,
    assert_same_states,
    build,
    gradients,
    heads,
    inputs_of,
    names,
    objective,
    tokens,
)
from tolerance import assert_as_precise

from deberta_fast.models.outputs import BaseModelOutput, SequenceClassifierOutput

# Outputs


@heads
def test_shapes_with_and_without_labels(name, head):
    model = build(name, head, id2label={0: "a", 1: "b", 2: "c"})
    inputs = inputs_of(head, labels=True)
    labelled = model(**inputs)
    bare = model(**inputs_of(head))
    minimal = model(inputs["input_ids"])
    shapes = {
        "Model": {"last_hidden_state": (3, 19, 32)},
        "ForMaskedLM": {"logits": (3, 19, 70)},
        "ForSequenceClassification": {"logits": (3, 3)},
        "ForTokenClassification": {"logits": (3, 19, 3)},
        "ForQuestionAnswering": {"start_logits": (3, 19), "end_logits": (3, 19)},
        "ForMultipleChoice": {"logits": (3, 3)},
    }[head]
    assert {key: tuple(x.shape) for key, x in bare.items()} == shapes == {k: tuple(x.shape) for k, x in minimal.items()}
    assert list(labelled) == ([] if head == "Model" else ["loss"]) + list(shapes)
    if head != "Model":
        assert labelled.loss.shape == () and torch.isfinite(labelled.loss)


@heads
def test_hidden_states_and_attentions_come_last(name, head):
    changes = EMD if head == "ForMaskedLM" else {}
    model, inputs = build(name, head, **changes), inputs_of(head)
    rows = 9 if head == "ForMultipleChoice" else 3
    plain = model(**inputs)
    assert "hidden_states" not in plain and "attentions" not in plain
    full = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert list(full) == [*plain, "hidden_states", "attentions"]
    assert [tuple(x.shape) for x in full.hidden_states] == [(rows, 19, 32)] * 3
    assert [tuple(x.shape) for x in full.attentions] == [(rows, 4, 19, 19)] * 2
    mask = inputs["attention_mask"].view(-1, 1, 1, 19).bool()
    for probabilities in full.attentions:
        pairs = (mask & mask.mT).expand_as(probabilities)
        padding = ~mask.mT.expand_as(probabilities)  # as a query, it weighs all keys alike, as in Hugging Face's
        assert not probabilities[~pairs & ~padding].any() and (probabilities[padding] == 1 / 19).all()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(rows, 4, 19))
    # the configuration can ask for them too
    for switch in ("output_hidden_states", "output_attentions"):
        setattr(model.config, switch, True)
    assert list(model(**inputs)) == list(full)
    assert list(model(**inputs, output_hidden_states=False, output_attentions=False)) == list(plain)


def test_the_last_hidden_state_is_the_states_last_and_the_first_is_the_embeddings():
    model, inputs = build("v2"), inputs_of("Model")
    outputs = model(**inputs, output_hidden_states=True)
    assert outputs.hidden_states[-1] is outputs.last_hidden_state
    ids, types, mask = inputs.values()
    assert torch.equal(outputs.hidden_states[0], model.embeddings(ids, mask.bool(), types))
    padding = mask == 0
    assert padding.any() and not outputs.hidden_states[0][padding].any()
    # the convolution masks its output
    assert not outputs.hidden_states[1][padding].any()


@heads
def test_every_argument_reaches_the_encoder(name, head):
    model, inputs = build(name, head, position_biased_input=True), inputs_of(head)
    position_ids = torch.arange(19).expand_as(inputs["input_ids"])
    expected = model(**inputs, position_ids=position_ids)[0]
    for key, other in (
        ("input_ids", (inputs["input_ids"] + 1) % 70),
        ("token_type_ids", 1 - inputs["token_type_ids"]),
        ("attention_mask", inputs["attention_mask"].flip(-1)),
        ("position_ids", position_ids + 1),
    ):
        changed = model(**{**inputs, "position_ids": position_ids, key: other})[0]
        assert (changed - expected).abs().max() > 1e-2, key


@heads
def test_tuples_hold_the_same(name, head):
    model, inputs = build(name, head), inputs_of(head, labels=True)
    switches = dict(output_hidden_states=True, output_attentions=True)
    by_name, by_position = model(**inputs, **switches), model(**inputs, **switches, return_dict=False)
    assert type(by_position) is tuple and len(by_position) == len(by_name)
    flat = [torch.utils._pytree.tree_leaves(x) for x in (by_name.to_tuple(), by_position)]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
    model.config.return_dict = False
    assert type(model(**inputs)) is tuple and type(model(**inputs, return_dict=True)) is type(by_name)


def test_outputs_are_read_by_name_attribute_and_position():
    output = SequenceClassifierOutput(logits=torch.ones(2), hidden_states=(torch.zeros(1),))
    assert output["logits"] is output.logits is output[0] and output[-1] is output.hidden_states
    assert output[:1] == (output.logits,) and output.loss is None and "loss" not in output
    assert list(output) == ["logits", "hidden_states"] and isinstance(output, dict)
    output.logits = torch.zeros(2)
    assert not output["logits"].any()
    output = SequenceClassifierOutput(loss=torch.zeros(()), **output)
    output["loss"] = torch.ones(())
    assert output.loss == 1 and output[0] is output.loss
    with pytest.raises(KeyError):
        output["attentions"]
    leaves, tree = torch.utils._pytree.tree_flatten(output)
    again = torch.utils._pytree.tree_unflatten([x + 1 for x in leaves], tree)
    assert type(again) is SequenceClassifierOutput and again.loss == 2 and list(again) == list(output)
    for clone in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert type(clone) is SequenceClassifierOutput and list(clone) == list(output)
        assert torch.equal(clone.logits, output.logits) and torch.equal(clone[2][0], output.hidden_states[0])


@names
def test_gradients_can_be_kept_of_states_and_attentions(name):
    model, inputs = build(name), inputs_of("Model")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    for x in (outputs.hidden_states[0], outputs.attentions[0]):
        x.retain_grad()
    outputs[0].flatten()[0].backward()
    assert outputs.hidden_states[0].grad.any() and outputs.attentions[0].grad.any()


@names
def test_attentions_change_nothing_else(name):
    model, inputs = build(name), inputs_of("Model")
    bare, dense = model(**inputs), model(**inputs, output_attentions=True)
    assert_same_states(dense[0], bare[0], inputs["attention_mask"])


def test_base_output_is_what_the_encoder_returns():
    assert type(build("v3")(**tokens())) is BaseModelOutput and LENGTH == tokens()["input_ids"].shape[1]


# Determinism, dropout, training


@heads
def test_evaluation_is_deterministic_and_training_draws(name, head):
    model = build(name, head, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    inputs = inputs_of(head)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], model(**inputs)[0])
        model.train()
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(model(**inputs)[0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


SITES = {
    "hidden": ("Model", dict(hidden_dropout_prob=0.3)),
    "attention": ("Model", dict(attention_probs_dropout_prob=0.3)),
    "pooler": ("ForSequenceClassification", dict(pooler_dropout=0.3)),
    "classifier": ("ForSequenceClassification", dict(cls_dropout=0.3)),
    "token-classifier": ("ForTokenClassification", dict(hidden_dropout_prob=0.3)),
}


@pytest.mark.parametrize("head, changes", SITES.values(), ids=SITES)
def test_each_dropout_drops(head, changes):
    model, inputs = build("v3", head, **changes).train(), inputs_of(head)
    with torch.no_grad():
        assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    quiet = build("v3", head).train()
    assert torch.equal(quiet(**inputs)[0], quiet(**inputs)[0])


def test_cls_dropout_is_hidden_dropout_by_default():
    assert build("v1", "ForSequenceClassification", hidden_dropout_prob=0.25).dropout.p == 0.25
    assert build("v1", "ForSequenceClassification", hidden_dropout_prob=0.25, cls_dropout=0).dropout.p == 0


@pytest.mark.parametrize("where", ["embeddings", "rel_embeddings", "attention", "attention.output", "output", "conv"])
def test_dropout_sites_of_the_encoder(where):
    """Each dropout changes the output in training on its own."""
    model, inputs = build("v2"), inputs_of("Model")
    layer = model.encoder.layer[0]
    site = {
        "embeddings": model.embeddings.dropout,
        "rel_embeddings": layer.attention.self.pos_dropout,
        "attention": layer.attention.self.dropout,
        "attention.output": layer.attention.output.dropout,
        "output": layer.output.dropout,
        "conv": model.encoder.conv.dropout,
    }[where]
    model.train()
    with torch.no_grad():
        before = model(**inputs)[0]
        site.p = 0.4
        assert (model(**inputs)[0] - before).abs().max() > 1e-2


def test_dropout_comes_before_the_residual_and_before_the_convolutions_activation():
    model, inputs = build("v2", hidden_dropout_prob=0.5).train(), inputs_of("Model")
    model.set_unpad(False)
    layer, conv = model.encoder.layer[0], model.encoder.conv
    for linear, dropout in (
        (layer.attention.output.dense, layer.attention.output.dropout),
        (layer.output.dense, layer.output.dropout),
        (conv.conv, conv.dropout),
    ):
        made, dropped = [], []
        hooks = [
            linear.register_forward_hook(lambda module, args, output, made=made: made.append(output)),
            dropout.register_forward_pre_hook(lambda module, args, dropped=dropped: dropped.append(args[0])),
        ]
        model(**inputs)
        output = made[0].transpose(1, 2) if linear is conv.conv else made[0]
        valid = inputs["attention_mask"].bool()
        assert torch.equal(dropped[0][valid], output[valid])
        for hook in hooks:
            hook.remove()


@heads
def test_every_parameter_learns(name, head):
    changes = EMD if head == "ForMaskedLM" else {}
    model, inputs = build(name, head, **changes).train(), inputs_of(head, labels=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    first = objective(model, inputs)
    first.backward()
    for parameter, value in model.named_parameters():
        # a key's bias adds the same number to all content scores of a query, so its gradient may be zero
        assert value.grad is not None and (value.grad.any() or parameter.endswith("key_proj.bias")), parameter
    optimizer.step()
    assert objective(model, inputs) < first


REENTRANT = {"default": None, "reentrant": {"use_reentrant": True}, "not-reentrant": {"use_reentrant": False}}


@pytest.mark.parametrize("keywords", REENTRANT.values(), ids=REENTRANT)
@pytest.mark.parametrize("name, changes", [("v1", {}), ("v2", {}), ("v3", {}), ("v3-conv", EMD)])
def test_checkpointing_of_activations_changes_no_gradient(name, changes, keywords):
    model, inputs = build(name, "ForMaskedLM", **changes).train(), inputs_of("ForMaskedLM", labels=True)
    assert not model.is_gradient_checkpointing
    expected = gradients(model, inputs)
    calls = []
    model.deberta.encoder.layer[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(keywords)
    assert model.is_gradient_checkpointing
    got = gradients(model, inputs)
    assert len(calls) == 2
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-5, msg=key)
    gradients(model.eval(), inputs)
    assert len(calls) == 3
    model.train().gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    gradients(model, inputs)
    assert len(calls) == 4


@pytest.mark.parametrize("keywords", REENTRANT.values(), ids=REENTRANT)
def test_checkpointing_replays_dropout(keywords):
    changes = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model, inputs = (
        build("v3", "ForTokenClassification", **changes).train(),
        inputs_of("ForTokenClassification", labels=True),
    )
    torch.manual_seed(5)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable(keywords)
    torch.manual_seed(5)
    for key, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-5, msg=key)


def test_frozen_embeddings_under_reentrant_checkpointing():
    model, inputs = (
        build("v3", "ForSequenceClassification").train(),
        inputs_of("ForSequenceClassification", labels=True),
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("query_proj" in name)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    objective(model, inputs).backward()
    assert model.deberta.encoder.layer[0].attention.self.query_proj.weight.grad.any()
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(inputs["input_ids"]).requires_grad


# Masks and lengths


@pytest.mark.parametrize("name", [*NAMES, "v3-conv", "v1-talking-heads"])
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_what_stands_in_padding_is_not_seen(name, padding):
    model, inputs = build(name, "ForMaskedLM", **EMD), tokens(padding)
    mask, expected = inputs["attention_mask"], model(**tokens(padding)).logits
    inputs["input_ids"] = torch.where(mask == 1, inputs["input_ids"], (inputs["input_ids"] + 11) % 70)
    inputs["token_type_ids"] = torch.where(mask == 1, inputs["token_type_ids"], 1 - inputs["token_type_ids"])
    assert_same_states(model(**inputs).logits, expected, mask)
    # without the mask, padding is read as text
    del inputs["attention_mask"]
    assert (model(**inputs).logits - expected)[mask.bool()].abs().max() > 0.1


@pytest.mark.parametrize("name", [*NAMES, "v1-absolute-only"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_padded_batch_is_its_texts_alone(name, padding):
    model, inputs = build(name), tokens(padding)
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch = model(**inputs, position_ids=position_ids)[0]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(
            *(x[row : row + 1, mask] for x in (inputs["input_ids"],)),
            None,
            inputs["token_type_ids"][row : row + 1, mask],
        )[0]
        assert_same_states(batch[row][mask], alone[0])


@names
def test_masks_of_all_dtypes_and_shapes(name):
    model, inputs = build(name, "ForMaskedLM", **EMD), tokens("holes")
    mask = inputs.pop("attention_mask")
    expected = model(**inputs, attention_mask=mask).logits
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16, torch.float64):
        for shaped in (mask, mask[:, None, None]):
            assert torch.equal(model(**inputs, attention_mask=shaped.to(dtype)).logits, expected), dtype
    pairs = mask[:, None] * mask[:, :, None]
    for shaped in (pairs, pairs[:, None], pairs.bool(), pairs.float()):
        assert_same_states(model(**inputs, attention_mask=shaped).logits, expected, mask)
    ones = torch.ones_like(mask)
    bare = model(**inputs).logits
    for shaped in (ones, ones[:, None] * ones[:, :, None]):
        assert_same_states(model(**inputs, attention_mask=shaped).logits, bare)


@names
def test_texts_packed_by_a_pairwise_mask_are_these_texts_alone(name):
    model, (ids, types, _) = build(name), tokens(length=40).values()
    part = torch.arange(40) >= 15
    pairs = (part[:, None] == part).expand(3, 40, 40)
    position_ids = torch.arange(40) - 15 * part
    if name == "v2":
        # the convolution reads one token across the border, so tokens near it are left out
        chosen = [slice(0, 13), slice(17, 40)]
        model = build(name, num_hidden_layers=1)
    else:
        chosen = [slice(0, 15), slice(15, 40)]
    packed = model(ids, pairs, types, position_ids[None])[0]
    for piece in chosen:
        start, stop = (0, 15) if piece.start == 0 else (15, 40)
        alone = model(ids[:, start:stop], None, types[:, start:stop])[0]
        assert_same_states(packed[:, piece], alone[:, piece.start - start : piece.stop - start])


@heads
def test_one_token_and_empty_batch(name, head):
    model = build(name, head)
    inputs = inputs_of(head, length=1)
    result = model(**inputs)[0]
    assert torch.isfinite(result).all()
    empty = {key: x[:0] for key, x in inputs.items()}
    assert model(**empty)[0].shape == (0, *result.shape[1:])
    objective(model.train(), inputs_of(head, length=1, labels=True)).backward()


def test_a_text_of_padding_alone_is_finite_and_touches_no_other():
    for name in (*NAMES, "v1-talking-heads"):
        model, inputs = build(name), tokens("right")
        expected = model(**inputs)[0]
        inputs["attention_mask"][1] = 0
        got = model(**inputs)[0]
        assert torch.isfinite(got).all()
        assert_same_states(got[[0, 2]], expected[[0, 2]], inputs["attention_mask"][[0, 2]])


def test_longer_than_max_position_embeddings():
    long = tokens("left", length=150)
    model = build("v3", "ForMaskedLM")
    got = model(**long).logits
    assert got.shape == (3, 150, 70)
    # without absolute positions, only distances count
    shorter = {key: x[:, 5:] for key, x in long.items()}
    visible = shorter["attention_mask"][0].bool()
    with torch.no_grad():
        exact = build("v3", "ForMaskedLM").double()(**shorter).logits[:1, visible]
        model.set_backend("reference")
        eager = model(**shorter).logits[:1, visible]
    assert_as_precise("logits", got.detach()[:1, 5:][:, visible], eager, exact)
    for name, changes in (("v1", {}), ("v2", {}), ("v3", EMD)):
        for length in (65, 150):
            message = f"max_position_embeddings=64 tokens long with absolute positions, got {length}"
            with pytest.raises(ValueError, match=message):
                build(name, "ForMaskedLM", **changes)(**tokens(length=length))
        build(name, "ForMaskedLM", **changes)(**tokens(length=64))
        build(name, "ForMaskedLM", **changes)(**long, position_ids=torch.arange(150)[None] % 64)


def test_padding_without_a_mask_is_warned_of_once():
    model, ids = build("v3"), tokens()["input_ids"]
    ids[0, -1] = 0
    with pytest.warns(UserWarning, match=r"input_ids hold padding \(0\), and there is no attention_mask"):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
        build("v3")(ids, attention_mask=torch.ones_like(ids))
        build("v3", pad_token_id=None)(ids)
