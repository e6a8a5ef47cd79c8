"""Padded batches of texts, the same texts packed, and helpers to compare models that run them."""

import torch
from torch.nn import functional as F

LENGTH = 37  # beyond v1's 24 relative positions, and far into the buckets of the others
# Rows of a padded batch: where tokens start and end, and the holes between them.
LAYOUTS = {
    "right": [(0, 37), (0, 11), (0, 24)],
    "left": [(30, 37), (0, 37), (12, 37)],
    "both sides": [(5, 31), (0, 9), (28, 36)],
    "holes": [(0, 37, 1, 2, 20, 35), (4, 30, 5, 28), (10, 20, 14, 15, 16)],
    "empty rows": [(0, 0), (3, 37), (0, 0), (0, 8), (0, 0)],
    "single tokens": [(0, 1), (36, 37), (17, 18), (0, 37)],
    "one row": [(4, 20)],
    "one token": [(0, 0), (9, 10)],
    "full": [(0, 37), (0, 37)],
}


def batch_of(layout, seed=1):
    """A padded batch. Padding holds random token ids too, so that code that reads it gives wrong results."""
    rows = LAYOUTS[layout] if isinstance(layout, str) else layout
    ids = torch.randint(1, 70, (len(rows), LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(ids)
    for row, (start, stop, *holes) in enumerate(rows):
        mask[row, start:stop] = 1
        mask[row, holes] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}


def spans_of(inputs):
    """(row, start, stop) of every row that holds tokens: from the first one to the last."""
    places = [row.nonzero().flatten().tolist() for row in inputs["attention_mask"]]
    return [(row, x[0], x[-1] + 1) for row, x in enumerate(places) if x]


def packed_of(inputs):
    """Arguments of forward_packed; rows without tokens are empty sequences."""
    spans = {row: (start, stop) for row, start, stop in spans_of(inputs)}
    lengths = [stop - start for start, stop in (spans.get(row, (0, 0)) for row in range(len(inputs["input_ids"])))]
    packed = {
        key: torch.cat([x[row, start:stop] for row, start, stop in spans_of(inputs)]) for key, x in inputs.items()
    }
    if packed["attention_mask"].all():
        del packed["attention_mask"]
    return packed | {"cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()}


def flat(output):
    return [x for item in output.to_tuple() for x in (item if isinstance(item, tuple) else (item,))]


def shapes_seen(model):
    """Returns a list that collects the shape of the states that each layer receives."""
    seen = []
    for layer in model.base_model.encoder.layer:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(got, expected, tolerance):
    largest = max(x.abs().max() for x in expected.values() if x is not None)
    for key, x in expected.items():
        assert (got[key] is None) == (x is None), key
        if x is not None:
            # The gradient of a key's bias is zero except for rounding.
            torch.testing.assert_close(
                got[key], x, rtol=0, atol=tolerance * float(max(x.abs().max(), 1e-3 * largest)), msg=key
            )
