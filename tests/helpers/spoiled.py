"""One NaN among the inputs, and the results that must be NaN because of it.

A query is spoilt if it contains the NaN, or if it sees the key or value that contains it. A backend loses no NaN and
spreads none too far:

- If the NaN is in a query or key, output and log-sum-exp are NaN for the spoilt queries and for no others. If it is in
  a value, only its column of their output is NaN, and no log-sum-exp is.
- dQ is NaN for every spoilt query. dK is NaN for every key that a spoilt query sees, and so is dV unless the NaN is in
  a value. The gradients of the tables are NaN in every row that a spoilt query reads. Without a mask or dropout nothing
  else is NaN.
- A mask keeps the NaN of a hidden key out of output and log-sum-exp. Gradients of the same head and batch row may still
  be NaN. If the NaN is in a hidden value, the output may be NaN too.
- Dropout may keep a NaN out of dV, since a dropped pair does not contribute to it.
- No result of another head or batch row is NaN.
"""

import torch
from cases import Case, as_dtype, forward_and_gradients, make_inputs

from deberta_fast.op.backends import reference
from deberta_fast.op.relative_position import distance_slots

# The queries meet near keys and far ones on both sides, and every row of the tables is read.
LONG = Case("", 330, 330, batch=1, heads=2)
HEAD = 1
PLACES = {"query": (150, 3), "key": (202, 5), "value": (171, 7)}


def where_nan(attention, case: Case, dtype: torch.dtype, name: str) -> dict[str, torch.Tensor]:
    """Where results of batch row 0 and HEAD are NaN if ``name`` has one NaN. Asserts that no other head has any."""
    inputs = make_inputs(case, dtype)
    row, column = PLACES[name]
    getattr(inputs, name)[0, HEAD, row, column] = torch.nan
    results = forward_and_gradients(attention, as_dtype(inputs, dtype))
    heads = {result: x.isnan() if "pos" in result else x.isnan()[0] for result, x in results.items()}
    assert not any(x[head].any() for x in heads.values() for head in range(case.heads) if head != HEAD)
    return {result: x[HEAD] for result, x in heads.items()}


def assert_same_nans(attention, case: Case, dtype: torch.dtype, name: str) -> None:
    """A backend has NaN exactly where the reference has it."""
    got, expected = where_nan(attention, case, dtype, name), where_nan(reference.attention, case, dtype, name)
    for result, where in expected.items():
        too_many, too_few = (got[result] & ~where).sum(), (where & ~got[result]).sum()
        assert (too_many, too_few) == (0, 0), f"{result}: {too_many} NaN too many, {too_few} too few of {where.sum()}"


def assert_no_nan_is_lost(attention, case: Case, dtype: torch.dtype, name: str) -> None:
    """Checks the rules above for all pairs that the mask leaves visible."""
    found, (place, column) = where_nan(attention, case, dtype, name), PLACES[name]
    inputs, length = make_inputs(case, dtype), case.query_length
    visible = torch.ones(length, length, dtype=torch.bool)
    if inputs.mask is not None:
        visible = inputs.mask[0, 0].expand(length, length)
    spoilt = visible[:, place]
    if name == "query":
        spoilt = (torch.arange(length) == place) & visible.any(1)
    pairs = visible & spoilt[:, None]
    assert pairs.any() and found["grad_query"][spoilt].all() and found["grad_key"][pairs.any(0)].all()
    distances = torch.arange(length)[:, None] - torch.arange(length)
    rows = distance_slots(inputs.device_tables.slots, distances)[pairs].unique()
    assert found["grad_pos_key"][rows].all() and found["grad_pos_query"][rows].all()
    if name == "value":
        assert not found["lse"].any() and found["output"][spoilt][:, column].all() and not found["grad_value"].any()
    else:
        assert found["lse"].equal(spoilt) and found["output"].equal(spoilt[:, None].expand_as(found["output"]))
        assert found["grad_value"][pairs.any(0)].all()
