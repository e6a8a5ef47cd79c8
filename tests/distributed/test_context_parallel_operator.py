"""The operator over several processes against the reference in one, by the rule of precision."""

import dataclasses

import pytest
import torch
from cases import BY_NAME, DROPOUT_SEED, Case, as_dtype, forward_and_gradients, make_inputs
from comparison import compare, compare_draws
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
# (number of processes, method): all of them for few cases, some for all.
ALL = [(number, method) for number in (1, 2, 3) for method in METHODS]
SOME = [(3, "ring"), (2, "gather"), (2, "heads"), (1, "ring")]


@pytest.fixture(scope="module")
def pools():
    with Processes(1) as one, Processes(2) as two, Processes(3) as three:
        yield {pool.number: pool for pool in (one, two, three)}


def case_for(name: str, pool) -> Case:
    case = BY_NAME[name]
    return dataclasses.replace(case, heads=pool.number * -(-case.heads // pool.number))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("number, method", SOME)
def test_dense(number, method, name, pools):
    pool = pools[number]
    compare(shared(pool, Way(method)), case_for(name, pool), torch.float32, draws=2)


@pytest.mark.parametrize("number, method", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, number, method, pools):
    """float64 is eager's; in bfloat16 partial outputs are rounded before they are merged."""
    pool = pools[number]
    compare(shared(pool, Way(method)), case_for("holes-L200", pool), dtype)


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("number, method", [(2, "ring"), (3, "gather")])
def test_masks_of_pairs(number, method, name, pools):
    pool = pools[number]
    compare(shared(pool, Way(method)), case_for(name, pool), torch.float32, draws=2)


# Sequences that end with a stretch, cross one end or two, are empty, are a single token or fill a stretch.
PACKED = {
    "two": ((0, 70, 150), None),
    "one": ((0, 150), None),
    "many": ((0, 3, 3, 40, 41, 77, 150, 150), None),
    "aligned": ((0, 50, 75, 100, 150), None),
    "short stretches": ((0, 9, 12, 150), (7, 3, 140)),
    "a process without rows": ((0, 60, 149, 150), (61, 0, 89)),
}


def packed_inputs(pool, ends, seed, dtype=torch.float32, dropout_p=0.0):
    """Packed sequences as a batch of one, whose mask separates them and hides some keys."""
    case = Case("packed", ends[-1], ends[-1], batch=1, heads=2 * pool.number, size=24, dropout_p=dropout_p)
    inputs, rows = make_inputs(case, dtype, seed), torch.arange(ends[-1])
    number = torch.bucketize(rows, torch.tensor(ends[1:]), right=True)
    return inputs._replace(mask=((number[:, None] == number) & (rows % 7 != seed))[None, None])


def lengths_for(pool, lengths):
    """The lengths of three processes, for as many as there are: the last gets the rest."""
    if lengths is None:
        return None
    return (*lengths[: pool.number - 1], sum(lengths[pool.number - 1 :]))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("number, method", [*SOME, (3, "gather")])
def test_packed(number, method, name, pools):
    """The reference gets the mask of pairs, the processes get cu_seqlens and the mask of keys."""
    pool = pools[number]
    ends, lengths = PACKED[name]
    way = Way(method, lengths_for(pool, lengths), ends)
    of_keys = lambda inputs: inputs._replace(mask=inputs.mask.any(2, keepdim=True))
    compare_draws(
        lambda inputs: shared(pool, way)(of_keys(inputs)), [packed_inputs(pool, ends, seed) for seed in range(2)]
    )


@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("number, method", [*SOME[:3], (3, "gather")])
def test_dropout_of_packed_sequences_is_one_processs(number, method, name, backend, pools):
    """The mask depends on places in sequences, wherever stretches begin, and the first process draws the seed."""
    pool = pools[number]
    ends, lengths = PACKED[name]
    dtype = torch.float64 if backend == "eager" else torch.float32
    inputs = as_dtype(packed_inputs(pool, ends, 0, dtype, dropout_p=0.3), dtype)
    inputs = inputs._replace(mask=inputs.mask.any(2, keepdim=True))

    def alone(inputs):
        torch.manual_seed(DROPOUT_SEED)
        output, lse = disentangled_attention_varlen(
            *(x.squeeze(0).transpose(0, 1) for x in inputs[:3]), *inputs[3:5], attention_mask=inputs.mask.reshape(-1),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32), max_seqlen=ends[-1], dropout_p=0.3, return_lse=True,
            position_buckets=inputs.position_buckets, max_relative_positions=inputs.max_relative_positions,
            scale=inputs.scale, backend=backend,
        )  # fmt: skip
        return output.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)

    expected = forward_and_gradients(alone, inputs)
    found = forward_and_gradients(shared(pool, Way(method, lengths_for(pool, lengths), ends, backend)), inputs)
    bound = 1e-11 if dtype == torch.float64 else 2e-5
    for key, x in expected.items():
        torch.testing.assert_close(
            found[key], x, rtol=bound, atol=bound * float(x.detach().abs().max().clamp(min=1)), msg=key
        )
