"""Every backend against the reference: output, log-sum-exp and all gradients, in the situations of ``cases``."""

import pytest
import torch
from cases import BY_NAME, CASES, ON_CPU, Case, as_dtype, forward_and_gradients, make_inputs
from comparison import (
    HALF_CASES,
    compare,
    mistake_far_distances,
    public,
    reversed_distance,
    shifted_slot,
    swapped_tables,
)
from tolerance import hf_style_attention

from deberta_fast.op.backends import eager, reference

BACKENDS = [name for name in ON_CPU if name != "reference"]
CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_equals_reference(case):
    compare(public("eager"), case, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_is_as_precise_as_eager(case, backend):
    compare(public(backend), case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HALF_CASES)
def test_half_is_as_precise_as_eager(name, backend, dtype):
    compare(public(backend), BY_NAME[name], dtype)


@pytest.mark.parametrize("name", ["ragged-L129-D64", "holes-L200", "mask-per-head-L70"])
def test_eager_in_many_chunks(name, monkeypatch):
    """The backend takes one head and one batch row at a time, in blocks that do not divide the lengths evenly."""
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS_CPU", 1)
    monkeypatch.setattr(eager, "BLOCK_ROWS", (32, 32))
    monkeypatch.setattr(eager.chunk.band, "STRIP_ROWS", (12, 12))
    compare(public("eager"), BY_NAME[name], torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing(backend):
    """They give zeros and a log-sum-exp of minus infinity, and add nothing to any gradient."""
    inputs = as_dtype(make_inputs(BY_NAME["whole-row-padded-L140"], torch.float32), torch.float32)
    output, lse = public(backend)(inputs)
    assert (output[0] == 0).all() and (lse[0] == -torch.inf).all() and torch.isfinite(lse[1]).all()
    grads = torch.autograd.grad(output.sum(), [inputs.query, inputs.key, inputs.value])
    assert all((grad[0] == 0).all() and torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bit_equal(backend):
    inputs = make_inputs(BY_NAME["holes-L200"], torch.float32)
    first, second = (forward_and_gradients(public(backend), as_dtype(inputs, torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_survives_large_weights(backend):
    """Unscaled products of these inputs exceed float16's range, although every score fits."""
    inputs = make_inputs(Case("large", 70, 70, batch=1), torch.float16)
    inputs = inputs._replace(query=inputs.query * 300, pos_key=inputs.pos_key * 60)
    exact = forward_and_gradients(reference.attention, as_dtype(inputs, torch.float32))
    assert not torch.isfinite(hf_style_attention(inputs)[0]).all()
    got = forward_and_gradients(public(backend), as_dtype(inputs, torch.float16))
    assert torch.isfinite(got["output"]).all()
    torch.testing.assert_close(got["output"].float(), exact["output"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mutate", [shifted_slot, swapped_tables, reversed_distance])
def test_a_wrong_table_is_caught(mutate, dtype):
    with pytest.raises(AssertionError, match="error"):
        compare(lambda inputs: public("eager")(mutate(inputs)), BY_NAME["ragged-L129-D64"], dtype)


@pytest.mark.parametrize("mistake", [{"far_past": -1}, {"far_future": 1}], ids=["past", "future"])
def test_a_far_segment_one_key_too_long_is_caught(mistake, monkeypatch):
    """This is the smallest mistake in the classification of keys: one pair per block of queries reads a wrong row."""
    mistake_far_distances(monkeypatch, **mistake)
    with pytest.raises(AssertionError, match="error"):
        compare(public("eager"), BY_NAME["far-L700"], torch.float32)
