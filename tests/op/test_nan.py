"""No backend loses a NaN, as ``spoiled`` promises."""

from dataclasses import replace

import pytest
import torch
from cases import ON_CPU
from comparison import public
from spoiled import LONG, PLACES, assert_no_nan_is_lost, assert_same_nans

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=["fp32", "bf16", "fp16"])
each_place = pytest.mark.parametrize("name", PLACES)


@each_dtype
@each_place
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
def test_nans_are_where_the_reference_has_them(backend, name, dtype):
    assert_same_nans(public(backend), LONG, dtype, name)


@each_dtype
@each_place
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("mask", [None, "holes", "blocks", "pairwise"])
def test_no_nan_is_lost(mask, backend, name, dtype):
    assert_no_nan_is_lost(public(backend), replace(LONG, mask=mask), dtype, name)
