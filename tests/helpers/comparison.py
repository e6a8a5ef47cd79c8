"""Compares a backend with the reference by the precision rule of ``tolerance``; mistakes that it must catch."""

import torch
from cases import DROPOUT_SEED, TENSORS, Case, as_dtype, forward_and_gradients, make_inputs
from tolerance import assert_as_precise, hf_style_attention

import deberta_fast
from deberta_fast.op.backends import reference
from deberta_fast.op.call import Call

HALF_CASES = [
    "one-token",
    "ragged-L129-D64",
    "far-L700",
    "v3-table-L1100",
    "holes-L200",
    "pairwise-mask-L150",
    "D80-L65",
]


def public(backend):
    """The public function, called with the fields of Call."""

    def attention(inputs):
        torch.manual_seed(DROPOUT_SEED)
        return deberta_fast.disentangled_attention(
            *(getattr(inputs, name) for name in TENSORS),
            position_buckets=inputs.position_buckets,
            max_relative_positions=inputs.max_relative_positions,
            far_negative=inputs.far_negative,
            attention_mask=inputs.mask,
            scale=inputs.scale,
            dropout_p=inputs.dropout_p,
            query_offset=inputs.query_offset,
            first_slot=inputs.first_slot,
            return_lse=True,
            backend=backend,
        )

    return attention


def compare(attention, case: Case, dtype: torch.dtype, draws: int = 4) -> None:
    """Compares output, log-sum-exp and gradients by the rule of ``tolerance``."""
    draws = [make_inputs(case, dtype, seed) for seed in range(1 if dtype == torch.float64 else draws)]
    if dtype == torch.float64 or case.key_length <= 1:
        # There is no yardstick: nothing is more precise than float64, and eager is exact for a softmax of one score.
        exact, got = _run(reference.attention, draws, torch.float64), _run(attention, draws, dtype)
        assert got.keys() == exact.keys()
        bound = 1e-11 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
        for name, x in got.items():
            message = lambda text, name=name: f"{name}: {text}"
            torch.testing.assert_close(x.double(), exact[name], rtol=bound, atol=bound, msg=message)
        return
    compare_draws(attention, draws)


def compare_draws(attention, draws: list[Call]) -> None:
    """Compares the results for these inputs, which have one shape, in their own dtype."""
    dtype = draws[0].query.dtype
    exact, got, yardstick = (
        _run(function, draws, kind)
        for function, kind in ((reference.attention, torch.float64), (attention, dtype), (hf_style_attention, dtype))
    )
    assert got.keys() == exact.keys()
    yardstick["lse"] = yardstick["lse"].float()  # ours is float32, whatever the inputs
    for name, x in got.items():
        assert_as_precise(name, x, yardstick[name], exact[name])


def _run(function, draws: list[Call], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    results = [forward_and_gradients(function, as_dtype(inputs, dtype)) for inputs in draws]
    return {name: torch.stack([result[name].detach() for result in results]) for name in results[0]}


def shifted_slot(inputs):
    return inputs._replace(pos_key=inputs.pos_key.roll(1, 1))


def swapped_tables(inputs):
    return inputs._replace(pos_key=inputs.pos_query, pos_query=inputs.pos_key)


def reversed_distance(inputs):
    return inputs._replace(pos_key=inputs.pos_key.flip(1), pos_query=inputs.pos_query.flip(1))


def mistake_far_distances(monkeypatch, **steps: int) -> None:
    """Makes far_past and far_future of every call wrong by these steps, on the host and on the device."""
    for name in ("table", "device_tables"):
        right = getattr(Call, name).fget

        def wrong(call, right=right):
            tables = right(call)
            return tables._replace(**{field: getattr(tables, field) + step for field, step in steps.items()})

        monkeypatch.setattr(Call, name, property(wrong))
