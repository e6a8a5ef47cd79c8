"""Rows of padding that something reads: losses, first tokens behind left padding, pooling over all positions."""

import warnings

import pytest
import torch
from hf_models import build
from packed_batches import LAYOUTS, LENGTH, batch_of
from torch import nn

import deberta_fast
from deberta_fast import patch, unpatch

pytestmark = pytest.mark.usefixtures("exact_hf")
NAMES = ("v1", "v2", "v3")
UNPAD = (False, True, "auto")


def gradients_of(model, loss):
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_same(got, expected, tolerance=1e-9):
    assert got.keys() == expected.keys()
    for name, y in expected.items():
        if y is not None:
            torch.testing.assert_close(got[name], y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())), msg=name)


HEADS = {
    "ForQuestionAnswering": lambda: dict(
        start_positions=torch.tensor([3, 30, 11]), end_positions=torch.tensor([5, 36, 0])
    ),
    "ForSequenceClassification": lambda: dict(labels=torch.tensor([1, 0, 1])),
    "ForTokenClassification": lambda: dict(labels=torch.arange(3 * LENGTH).view(3, LENGTH) % 2),
    "ForMaskedLM": lambda: dict(labels=torch.arange(3 * LENGTH).view(3, LENGTH) % 70),
}


@pytest.mark.parametrize("layout", ["right", "left", "holes"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_patched_models(name, head, layout):
    """Labels at padding count like all others in these losses."""
    model, inputs = build(name, head).double(), batch_of(layout) | HEADS[head]()
    expected = unpatch(model)(**inputs)
    gradients = gradients_of(model, expected.loss)
    for unpad in UNPAD:
        got = patch(model, unpad=unpad)(**inputs)
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-9, msg=f"{key}, {unpad}")
        assert_same(gradients_of(model, got.loss), gradients)


@pytest.mark.parametrize("layout", ["right", "left", "holes"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_native_models(name, head, layout, tmp_path):
    theirs, inputs = build(name, head), batch_of(layout) | HEADS[head]()
    theirs.save_pretrained(tmp_path)
    ours = getattr(deberta_fast, type(theirs).__name__).from_pretrained(tmp_path).double()
    expected = theirs.double()(**inputs)
    for unpad in UNPAD:
        ours.set_unpad(unpad)
        got = ours(**inputs)
        for key in expected:
            # Hugging Face takes the loss of classifiers in float32
            tolerance = 1e-6 if key == "loss" else 1e-9
            error = (got[key] - expected[key]).abs().max()
            assert error <= tolerance, (key, unpad)


class Pooled(nn.Module):
    """Common heads on top of an encoder that ignore the mask."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lstm = model, nn.LSTM(64, 16, batch_first=True, bidirectional=True)

    def forward(self, **inputs):
        output = self.model(**inputs, output_hidden_states=True)
        states, fused = output.last_hidden_state, torch.stack(output.hidden_states).mean(0)
        return torch.cat(
            [states.mean(1), states.amax(1), self.lstm(states)[0][:, -1], fused.mean(1), states[:, -1]], -1
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_pooling_over_all_positions(name, layout):
    torch.manual_seed(0)
    model, inputs = Pooled(build(name)).double(), batch_of(layout)
    expected = unpatch(model)(**inputs)
    gradients = gradients_of(model, expected.square().sum())
    for unpad in UNPAD:
        got = patch(model, unpad=unpad)(**inputs)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        assert_same(gradients_of(model, got.square().sum()), gradients)


@pytest.mark.parametrize("shape", ["rows that see nothing", "keys of all alike", "a head each"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_of_attention_modules(name, shape):
    """Queries that see no key get Hugging Face's result, for every shape of the mask."""
    attention = build(name).double().encoder.layer[0].attention.self
    states, mask = torch.randn(2, 19, 64).double(), torch.rand(2, 1, 19, 19) > 0.5
    mask[0, :, 3:5], mask[1, :, :, :] = False, False
    if shape == "keys of all alike":
        mask = mask[:, :, :1]
    elif shape == "a head each":
        mask = mask & (torch.rand(2, 4, 19, 1) > 0.3)
    arguments = dict(rel_embeddings=torch.randn({"v1": 48, "v2": 32, "v3": 32}[name], 64).double())
    if name == "v1":
        places = torch.arange(19)
        arguments["relative_pos"] = (places[:, None] - places)[None]
    expected = unpatch(attention)(states, mask, **arguments)[0]
    if name == "v1":
        return  # v1 is not fused with relative_pos, and is tested elsewhere
    torch.testing.assert_close(patch(attention)(states, mask, **arguments)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("unpad", UNPAD)
def test_dropout_on_the_way_keeps_the_mean(unpad):
    """Attention's dropout leaves rows of padding as they are without dropout."""
    model, inputs = build("v3", attention_probs_dropout_prob=0.4, num_hidden_layers=1), batch_of("right")
    with torch.no_grad():
        exact = model.eval()(**inputs)[0]
        got = patch(model, unpad=unpad).train()(**inputs)[0]
    padding = inputs["attention_mask"] == 0
    torch.testing.assert_close(got[padding], exact[padding], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[~padding], exact[~padding], atol=1e-2)


def test_half_precision():
    model, inputs = build("v3"), batch_of("right")
    exact = unpatch(model).double()(**inputs)[0]
    padding = inputs["attention_mask"] == 0
    for dtype in (torch.bfloat16, torch.float16):
        eager = (unpatch(model).to(dtype)(**inputs)[0].double() - exact)[padding].norm()
        for unpad in UNPAD:
            error = (patch(model, unpad=unpad)(**inputs)[0].double() - exact)[padding].norm()
            assert error <= 1.5 * eager


@pytest.mark.parametrize("unpad", [True, "auto"])
def test_left_padding_as_zeros_is_warned_of(unpad):
    model = patch(build("v3", "ForSequenceClassification"), unpad=unpad, padding_rows="zeros")
    with pytest.warns(UserWarning, match="first row .* padding"):
        model(**batch_of("left"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch_of("left"))
        patch(model, unpad=unpad, padding_rows="zeros")(**batch_of("right"))
