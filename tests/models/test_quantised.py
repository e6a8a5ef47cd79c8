"""Linear layers in int8 by torch's dynamic quantisation: attention between them stays fused."""

import copy

import pytest
import torch
from native_models import build, tokens
from torch import nn

from deberta_fast import backends, patch

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("torch.ao.quantization is deprecated:DeprecationWarning", "torch.quantize_per_tensor:UserWarning")
]


@pytest.fixture
def kernel_calls(monkeypatch):
    """The backends whose fused forward ran, one per call."""
    calls = []

    def counting(name, forward):
        return lambda *arguments: calls.append(name) or forward(*arguments)

    for name, backend in backends.BACKENDS.items():
        if name != "reference":
            monkeypatch.setattr(backend, "forward", counting(name, backend.forward))
    return calls


def quantised(model):
    """A quantised copy of the model."""
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in model.modules())
    return model


def answer(model, inputs):
    with torch.no_grad():
        states = model(**inputs)[0]
    return states[inputs["attention_mask"].bool()] if states.dim() == 3 else states


def assert_same_but_for_rounding(got, expected):
    """A difference in the last digit may round to the next of int8's 255 values. In a model of one layer, this changes
    the states of one token."""
    rounding = 1e-5 * float(expected.abs().max())
    assert ((got - expected).abs() > rounding).float().mean() < 0.05


# Hugging Face projects its whole table and has other states at padding. Both can change the range that int8 is scaled
# to. The numbers are the same if a text reaches the whole table and there is no padding.
@pytest.mark.parametrize("padding, length", [("none", 83), ("right", 83), ("none", 20)])
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_patched(name, padding, length, kernel_calls):
    from hf_models import build as build_huggingface

    model, inputs = build_huggingface(name, num_hidden_layers=1), tokens(padding, length)
    exact, eager = answer(model, inputs), answer(quantised(model), inputs)
    assert not kernel_calls
    first, second = (answer(x, inputs) for x in (patch(quantised(model)), quantised(patch(copy.deepcopy(model)))))
    assert len(kernel_calls) == 2 and torch.equal(first, second)
    error = (eager - exact).abs().mean()
    assert (first - exact).abs().mean() < 1.2 * error and error < 0.05 * exact.std()
    if (padding, length) == ("none", 83):
        assert_same_but_for_rounding(first, eager)


@pytest.mark.parametrize("name, head", [("v1", "ForMaskedLM"), ("v2", "Model"), ("v3", "ForTokenClassification")])
def test_native(name, head, kernel_calls):
    model, inputs = build(name, head, num_hidden_layers=1), tokens("holes")
    exact, got = answer(model, inputs), answer(quantised(model), inputs)
    assert len(kernel_calls) == 2 and 0 < (got - exact).abs().mean() < 0.05 * exact.std()
    model.set_backend("reference")
    assert_same_but_for_rounding(got, answer(quantised(model), inputs))
    assert len(kernel_calls) == 2


def test_an_untied_language_model():
    model, inputs = build("v1", "ForMaskedLM", legacy=True, tie_word_embeddings=False), tokens("right")
    with torch.no_grad():
        expected = model(**inputs).logits
        got = quantised(model)(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert 0 < (got - expected)[valid].std() < 0.05 * expected[valid].std()
