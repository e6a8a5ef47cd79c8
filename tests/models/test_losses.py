"""Losses and logits of the task models, computed again by hand."""

import pytest
import torch
from native_models import build, inputs_of
from torch.nn import functional as F


def test_losses_of_sequences():
    loss = lambda model, labels: model(**inputs, labels=labels)
    inputs = inputs_of("ForSequenceClassification")
    model = build("v3", "ForSequenceClassification", num_labels=3)
    logits = model(**inputs).logits
    log = logits.log_softmax(-1)
    classes = torch.tensor([2, 0, 1])
    expected = -log[range(3), classes].mean()
    for labels in (classes, classes[:, None], classes.float()):
        torch.testing.assert_close(loss(model, labels).loss, expected)
    torch.testing.assert_close(loss(model, torch.tensor([2, -100, -1])).loss, -log[0, 2])
    assert loss(model, torch.tensor([-100, -1, -1])).loss == 0
    soft = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]])
    torch.testing.assert_close(loss(model, soft).loss, -(soft * log).sum() / 3)
    model.config.problem_type = "single_label_classification"
    torch.testing.assert_close(loss(model, classes).loss, expected)
    torch.testing.assert_close(loss(model, torch.tensor([2, -100, 1])).loss, -(log[0, 2] + log[2, 1]) / 2)
    with pytest.raises(IndexError, match="Target -1 is out of bounds"):
        loss(model, torch.tensor([2, -1, 1]))
    model.config.problem_type = "multi_label_classification"
    several = (soft > 0.2).float()
    by_hand = -(several * F.logsigmoid(logits) + (1 - several) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(loss(model, several).loss, by_hand)
    torch.testing.assert_close(loss(model, several.long()).loss, by_hand)
    model.config.problem_type = "regression"
    torch.testing.assert_close(loss(model, soft).loss, (logits - soft).pow(2).mean())
    single = build("v3", "ForSequenceClassification", num_labels=1)
    value = single(**inputs).logits
    assert value.shape == (3, 1)
    for problem, shape in ((None, (3,)), ("regression", (3, 1))):
        single.config.problem_type = problem
        for labels in (classes, classes.float(), classes.float()[:, None]):
            got = loss(single, labels)
            assert got.logits.shape == shape
            torch.testing.assert_close(got.loss, (value[:, 0] - classes).pow(2).mean())


def test_losses_of_tokens_spans_and_choices():
    inputs = inputs_of("ForTokenClassification")
    labels = inputs["input_ids"] % 2
    labels[:, 4:] = -100
    for head, number in (("ForTokenClassification", 2), ("ForMaskedLM", 70)):
        outputs = build("v3", head)(**inputs, labels=labels)
        log = outputs.logits[:, :4].log_softmax(-1)
        assert log.shape[-1] == number
        torch.testing.assert_close(outputs.loss, -log.gather(-1, labels[:, :4, None]).mean())
    model = build("v3", "ForQuestionAnswering")
    starts, ends = torch.tensor([3, 19, 7]), torch.tensor([[5], [2], [400]])
    outputs = model(**inputs, start_positions=starts, end_positions=ends)
    padding = inputs["attention_mask"] == 0
    for rows in ("hf", "zeros"):  # padding counts with "hf" and not with "zeros"
        read = [outputs[f"{x}_logits"].masked_fill(padding & (rows == "zeros"), -torch.inf) for x in ("start", "end")]
        start, end = (x.log_softmax(-1) for x in read)
        by_hand = -(start[0, 3] + start[2, 7] + end[0, 5] + end[1, 2]) / 4
        for unpad in (False, True):
            model.set_unpad(unpad, rows)
            torch.testing.assert_close(model(**inputs, start_positions=starts, end_positions=ends).loss, by_hand)
    starts[1] = padding[1].int().argmax()
    torch.testing.assert_close(model(**inputs, start_positions=starts, end_positions=ends).loss, by_hand)
    assert model(**inputs, start_positions=starts).loss is None
    with pytest.raises(ValueError, match=r"end_positions must be of shape \(3,\), got \(1,\)"):
        model(**inputs, start_positions=starts, end_positions=ends[0])
    model = build("v3", "ForMultipleChoice")
    inputs = inputs_of("ForMultipleChoice")
    outputs = model(**inputs, labels=torch.tensor([2, 0, 1]))
    torch.testing.assert_close(outputs.loss, -outputs.logits.log_softmax(-1)[[0, 1, 2], [2, 0, 1]].mean())
    for choice in range(3):
        alone = {key: x[:, choice : choice + 1] for key, x in inputs.items()}
        torch.testing.assert_close(model(**alone).logits[:, 0], outputs.logits[:, choice], atol=1e-5, rtol=1e-5)


def test_classifiers_by_hand():
    inputs = inputs_of("Model")
    model = build("v1", "ForSequenceClassification", pooler_hidden_size=20, pooler_hidden_act="tanh", num_labels=3)
    first = model.deberta(**inputs)[0][:, 0]
    pooled = torch.tanh(first @ model.pooler.dense.weight.T + model.pooler.dense.bias)
    assert pooled.shape == (3, 20)
    torch.testing.assert_close(model(**inputs).logits, pooled @ model.classifier.weight.T + model.classifier.bias)
    model = build("v3", "ForQuestionAnswering")
    both = model.deberta(**inputs)[0] @ model.qa_outputs.weight.T + model.qa_outputs.bias
    outputs = model(**inputs)
    torch.testing.assert_close(torch.stack([outputs.start_logits, outputs.end_logits], -1), both)
