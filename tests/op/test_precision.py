"""The yardstick itself: Hugging Face's order of operations is right, and the rule rejects what it should."""

import pytest
import torch
from cases import BY_NAME, make_inputs

from deberta_fast.op.backends import reference
from deberta_fast.op.precision import assert_as_precise, hf_style_attention, hf_style_scores


@pytest.mark.parametrize("name", ["ragged-L129-D64", "short-query-offset-at-end", "table-window-L20", "dropout-L140"])
def test_in_float64_eager_is_the_reference(name):
    inputs = make_inputs(BY_NAME[name], torch.float64)
    for got, want in zip(hf_style_attention(inputs), reference.attention(inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # its scale is float32, as Hugging Face's


def test_slots_of_the_caller():
    inputs = make_inputs(BY_NAME["ragged-L129-D64"], torch.float32)
    same = torch.zeros(129, 129, dtype=torch.int64)
    changed = inputs._replace(pos_key=inputs.pos_key[:, :1].expand_as(inputs.pos_key), pos_query=None)
    got = hf_style_scores(inputs._replace(pos_query=None), (same, same))
    torch.testing.assert_close(got, hf_style_scores(changed))


@pytest.fixture
def draws():
    """Returns two draws of 1000 elements: exact ones, and eager ones with an error of 1e-3 everywhere."""
    torch.manual_seed(0)
    exact = torch.randn(2, 1000, dtype=torch.float64)
    return exact, (exact + 1e-3).float()


def test_twice_the_error_is_allowed(draws):
    exact, eager = draws
    assert_as_precise("output", (exact - 1.99e-3).float(), eager, exact)
    assert_as_precise("output", eager[:, :0], eager[:, :0], exact[:, :0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda got: got.index_fill_(1, torch.tensor([7]), 9.0), "output: max error .*, allowed 2.00e-03"),
        (lambda got: got.add_(1.2e-3), "output: mean error 2.21e-03, allowed 2.02e-03"),
        (lambda got: got.index_fill_(1, torch.tensor([7]), torch.nan), "output is not finite"),
        (lambda got: got.half(), "output is of dtype torch.float16, not torch.float32"),
        (lambda got: got[:, :-1], r"output is of shape \(2, 999\), not \(2, 1000\)"),
    ],
    ids=["max", "mean", "nan", "dtype", "shape"],
)
def test_more_is_not(draws, change, message):
    exact, eager = draws
    if "mean" in message:  # one element of eager is so wrong that every maximum is allowed
        eager[:, 0] += 1e-2
    with pytest.raises(AssertionError, match=message):
        assert_as_precise("output", change(eager.clone()), eager, exact)
