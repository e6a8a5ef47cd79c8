"""The table of slots, judged by Hugging Face's dense index and by closed forms."""

import pytest
import torch

from deberta_fast.op.relative_position import FAR_NEGATIVE_RULES, distance_slots, slot_table

BUCKETED = [(256, 512), (128, 512), (320, 512), (32, 64), (16, 64), (8, 16), (384, 1024)]
UNBUCKETED = [512, 128, 20]
TABLES = [*BUCKETED, *((-1, longest) for longest in UNBUCKETED)]
tables = pytest.mark.parametrize("buckets, longest", TABLES, ids=[f"B{b}-M{m}" for b, m in TABLES])


def hf_slots(query_length, key_length, buckets, longest):
    """Returns Hugging Face's own index of every (query, key), clamped to its span."""
    modeling = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    query, key = torch.empty(query_length, 1), torch.empty(key_length, 1)
    span = buckets if buckets > 0 else longest
    return torch.clamp(modeling.build_relative_position(query, key, buckets, longest)[0] + span, 0, 2 * span - 1)


def slots_of(table, distances):
    return distance_slots(torch.tensor(table.slots), distances)


def our_slots(query_length, key_length, table, offset=0):
    return slots_of(table, torch.arange(query_length)[:, None] + offset - torch.arange(key_length)[None, :])


@tables
def test_every_length_to_600_is_hugging_faces(buckets, longest):
    table, lengths = slot_table(buckets, longest), range(1, 601)
    for length in (1, 2, 7, 64, 257, 600):
        assert torch.equal(our_slots(length, length, table), hf_slots(length, length, buckets, longest))
    # For other lengths the first column (every i - 0) and first row (every 0 - j) suffice: both indices are Toeplitz.
    past, future = our_slots(600, 1, table), our_slots(1, 600, table)
    for length in lengths:
        assert torch.equal(past[:length], hf_slots(length, 1, buckets, longest))
        assert torch.equal(future[:, :length], hf_slots(1, length, buckets, longest))


@tables
def test_edges_to_4096_are_hugging_faces(buckets, longest):
    table = slot_table(buckets, longest)
    past, future = hf_slots(4096, 1, buckets, longest)[:, 0], hf_slots(1, 4096, buckets, longest)[0]
    middle = max(buckets, 2) // 2
    edges = {edge + step for edge in (0, middle, longest - 1, longest, 4094) for step in (-2, -1, 0, 1)}
    for distance in sorted(d for d in edges if d >= 0):
        assert table.slot(distance) == past[distance], distance
        assert table.slot(-distance) == future[distance], -distance
    assert torch.equal(our_slots(4096, 1, table)[:, 0], past) and torch.equal(our_slots(1, 4096, table)[0], future)


@pytest.mark.parametrize("longest", UNBUCKETED)
def test_v1_reads_a_slice_of_the_same_table(longest):
    """Hugging Face's v1 cuts rows M - S to M + S out of its table, S = min(L, M), and clamps to these."""
    v1 = pytest.importorskip("transformers.models.deberta.modeling_deberta")
    table = slot_table(0, longest)
    for length in (1, 2, 19, 20, 21, 127, 128, 129, 300, 511, 512, 513, 600):
        states = torch.empty(length, 1)
        span = int(v1.compute_attention_span(states, states, longest))
        theirs = torch.clamp(v1.build_relative_position(states, states)[0] + span, 0, 2 * span - 1) + longest - span
        assert torch.equal(our_slots(length, length, table), theirs)


@pytest.mark.parametrize("buckets, longest", BUCKETED)
def test_microsofts_rule_differs_beyond_the_last_distance_alone(buckets, longest):
    ours, theirs = slot_table(buckets, longest, "hf"), slot_table(buckets, longest, "ms")
    for distance in range(1 - longest, longest):
        assert ours.slot(distance) == theirs.slot(distance), distance
    for distance in (longest, longest + 1, 2 * longest, 10**9):
        assert theirs.slot(-distance) == theirs.slot(1 - longest) == 1
        assert theirs.slot(distance) == ours.slot(distance) == 2 * buckets - 1
    assert ours.slot(-(10**9)) == 0


@pytest.mark.parametrize("longest", UNBUCKETED)
def test_without_buckets_both_rules_are_the_clamped_distance(longest):
    for rule in FAR_NEGATIVE_RULES:
        table = slot_table(-1, longest, rule)
        distances = range(-3 * longest, 3 * longest + 1)
        assert [table.slot(d) for d in distances] == [max(0, min(2 * longest - 1, d + longest)) for d in distances]


@tables
@pytest.mark.parametrize("rule", FAR_NEGATIVE_RULES)
def test_shape_of_the_table(buckets, longest, rule):
    table = slot_table(buckets, longest, rule)
    assert table.rows == 2 * (buckets if buckets > 0 else longest)
    assert len(table.slots) == 2 * table.reach + 1 and list(table.slots) == sorted(table.slots)
    assert table.slots[-1] == table.rows - 1 and table.slot(0) == table.rows // 2
    # Slots are constant from far_past and far_future on, and not a step earlier.
    assert table.slot(table.far_past) == table.slots[-1] != table.slot(table.far_past - 1)
    assert table.slot(table.far_future) == table.slots[0] != table.slot(table.far_future + 1)
    assert table.reach == max(table.far_past, -table.far_future)


def test_saturation_of_the_released_tables():
    table = slot_table(256, 512)
    assert (table.far_past, table.far_future, table.reach) == (506, -512, 512)
    assert (table.slot(506), table.slot(505), table.slot(-511), table.slot(-512)) == (511, 510, 1, 0)
    # ms: -506 is the first distance of the bucket of -511.
    assert slot_table(256, 512, "ms").far_future == -506


WINDOWS = {
    "one-token": (1, 1, 0), "square": (37, 37, 0), "longer-than-reach": (700, 700, 0), "few-queries": (3, 90, 0),
    "few-keys": (90, 3, 0), "next-token": (1, 90, 89), "all-past": (8, 16, 400), "all-future": (8, 16, -400),
    "far-past": (4, 4, 5000), "far-future": (4, 4, -5000),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("buckets, longest", [(256, 512), (16, 64), (-1, 20)])
def test_window_is_what_is_reached(case, buckets, longest):
    query_length, key_length, offset = WINDOWS[case]
    for rule in FAR_NEGATIVE_RULES:
        table = slot_table(buckets, longest, rule)
        slots = our_slots(query_length, key_length, table, offset)
        assert table.window(query_length, key_length, offset) == (int(slots.min()), int(slots.max()) + 1)
    assert table.window(query_length, key_length) == table.window(query_length, key_length, 0)


def test_distance_slots_keeps_shape_and_takes_any_integer():
    table = slot_table(16, 64)
    distances = torch.tensor([[[-(2**40), -64, -1]], [[0, 1, 2**40]]])
    slots = slots_of(table, distances)
    assert slots.dtype == torch.int64 and slots.shape == distances.shape
    assert slots.flatten().tolist() == [0, 0, 15, 16, 17, 31]
    assert slots_of(table, distances.clamp(-9, 9).int()).tolist() == [
        [[7, 7, 15]],
        [[16, 17, 25]],
    ]
    assert slots_of(table, distances[:0]).shape == (0, 1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_dtype_does_not_matter(dtype):
    expected = {(b, m): slot_table(b, m) for b, m in TABLES}
    before = torch.get_default_dtype()
    slot_table.cache_clear()
    try:
        torch.set_default_dtype(dtype)
        assert {(b, m): slot_table(b, m) for b, m in TABLES} == expected
        assert torch.equal(our_slots(9, 9, expected[16, 64]), torch.arange(9)[:, None] - torch.arange(9) + 16)
    finally:
        torch.set_default_dtype(before)
        slot_table.cache_clear()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((256, 512, "both"), r"far_negative must be one of \('hf', 'ms'\), got 'both'"),
        ((0, 0), "max_relative_positions must be at least 1, got 0"),
        ((256, -1), "max_relative_positions must be at least 1, got -1"),
        ((1, 512), "position_buckets must be at least 2 .* got position_buckets=1, max_relative_positions=512"),
        ((256, 129), "at least position_buckets // 2 \\+ 2, got position_buckets=256, max_relative_positions=129"),
    ],
)
def test_numbers_that_describe_no_table(arguments, message):
    with pytest.raises(ValueError, match=message):
        slot_table(*arguments)


@pytest.mark.parametrize("buckets, longest", [(256, 130), (2, 3), (2, 512), (3, 8), (4, 4), (7, 20)])
def test_smallest_and_odd_buckets_are_hugging_faces(buckets, longest):
    table = slot_table(buckets, longest)
    assert torch.equal(our_slots(300, 300, table), hf_slots(300, 300, buckets, longest))
