"""The operator over several processes against the reference in one, by the rule of precision."""

import dataclasses

import pytest
import torch
from cases import BY_NAME, DROPOUT_SEED, Case, as_dtype, forward_and_gradients, make_inputs
from comparison import compare, compare_draws, public
from processes import Processes
from shared_attention import Way, shared

from deberta_fast import disentangled_attention_varlen

METHODS = ("ring", "gather", "heads")
CASES = [
    "one-token", "ragged-L129-D64", "ragged-L129-D64-c2p-only", "ragged-L129-D64-p2c-only", "ragged-L129-D64-neither",
    "far-L700", "v3-table-L1100", "ms-rule-L300", "v1-no-buckets-L200", "right-padding-L200", "left-padding-L200",
    "holes-L200", "whole-row-padded-L140", "table-window-L20", "fused-qkv-views-L129-D24", "dropout-L140",
]  # fmt: skip
OF_PAIRS = ["pairwise-mask-L150", "mask-per-head-L70"]


@pytest.fixture(scope="module", params=(1, 2, 3))
def pool(request):
    with Processes(request.param) as processes:
        yield processes


def case_for(name: str, pool) -> Case:
    case = BY_NAME[name]
    return dataclasses.replace(case, heads=pool.number * -(-case.heads // pool.number))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_dense(method, name, pool):
    compare(shared(pool, Way(method)), case_for(name, pool), torch.float32, draws=2)
