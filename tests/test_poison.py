"""Unwritten memory is poisoned in these tests, so that what a kernel leaves out shows."""

import pytest
import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
like = torch.zeros(())
MAKERS = [
    lambda dtype: torch.empty(5, 3, dtype=dtype),
    lambda dtype: torch.empty_like(torch.zeros(5, 3, dtype=dtype)),
    lambda dtype: torch.empty_strided((5, 3), (1, 5), dtype=dtype),
    lambda dtype: like.new_empty(5, 3, dtype=dtype),
    lambda dtype: like.new_empty_strided((5, 3), (1, 5), dtype=dtype),
]


@pytest.mark.parametrize("make", MAKERS, ids=["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])
def test_empty_memory_is_poisoned(make):
    assert all(make(dtype).isnan().all() for dtype in FLOATS)
    assert (make(torch.int32) == 2**31 - 1).all() and make(torch.bool).all()


def test_what_programs_record_is_not_poisoned():
    traced = torch.jit.trace(lambda x: torch.empty_like(x).copy_(x), torch.ones(3), check_trace=False)
    assert "fill_" not in str(traced.graph)
    assert torch.empty(2, device="meta").is_meta and torch.empty(2, requires_grad=True).isnan().all()


def test_default_devices_still_apply():
    """Models are made on the meta device, where ten terabytes take no memory."""
    with torch.device("meta"):
        made = [torch.empty(10**13), torch.nn.Linear(10**6, 10**6).weight, torch.zeros(10**13)]
    assert all(x.is_meta for x in made)
