"""TokenBudgetSampler keeps and fills its budget and loses no sequence; PackedCollator packs features into a batch."""

import pickle
import random
from collections import Counter, UserDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import build, tokens
from sequence_lengths import uniform
from torch.utils.data import DataLoader

from deberta_fast.data import PackedCollator, TokenBudgetSampler


def cost(lengths, padded):
    return len(lengths) * max(lengths) if padded else sum(lengths)


samplers = st.fixed_dictionaries(
    dict(
        lengths=st.lists(st.integers(1, 40), max_size=60),
        max_tokens=st.integers(40, 130),
        padded=st.booleans(),
        max_sequences=st.none() | st.integers(1, 5),
        shuffle=st.booleans(),
        seed=st.integers(-3, 3),
        num_replicas=st.integers(1, 4),
    )
)


@settings(max_examples=120, deadline=None, database=None)
@given(samplers, st.integers(0, 3))
def test_every_sequence_once_within_the_budget(arguments, epoch):
    lengths, replicas = arguments["lengths"], arguments["num_replicas"]
    ranks = [TokenBudgetSampler(**arguments, rank=rank) for rank in range(replicas)]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in ranks]
    assert {len(own) for own in batches} == {len(ranks[0])}
    everything = [tuple(batch) for own in batches for batch in own]
    for batch in everything:
        assert 0 < len(batch) <= (arguments["max_sequences"] or 60)
        assert cost([lengths[i] for i in batch], arguments["padded"]) <= arguments["max_tokens"]
    different = set(everything)
    assert sorted(i for batch in different for i in batch) == list(range(len(lengths)))
    assert len(everything) - len(different) == -len(different) % replicas
    assert max(Counter(everything).values(), default=0) <= -(-replicas // max(1, len(different))) + 1
    assert [list(sampler) for sampler in ranks] == batches


@settings(max_examples=60, deadline=None, database=None)
@given(samplers, st.integers(0, 3))
def test_drop_last_leaves_out_less_than_one_batch_a_rank(arguments, epoch):
    replicas = arguments.pop("num_replicas")
    alone = TokenBudgetSampler(**arguments, drop_last=True)
    alone.set_epoch(epoch)
    expected = {tuple(batch) for batch in alone}
    kept = len(expected) // replicas
    ranks = [TokenBudgetSampler(**arguments, drop_last=True, num_replicas=replicas, rank=r) for r in range(replicas)]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    if expected and not kept:
        with pytest.raises(ValueError, match=f"leave out all {len(expected)} batches"):
            len(ranks[0])
        return
    batches = [tuple(batch) for sampler in ranks for batch in sampler]
    assert [len(sampler) for sampler in ranks] == [kept] * replicas
    assert len(set(batches)) == len(batches) == kept * replicas and set(batches) <= expected


def test_in_order():
    lengths = [3, 4, 5, 1, 1, 9, 2]
    in_order = lambda **options: list(TokenBudgetSampler(lengths, 9, shuffle=False, **options))
    assert in_order() == [[0, 1], [2, 3, 4], [5], [6]]
    assert in_order(padded=True) == [[0, 1], [2], [3, 4], [5], [6]]
    assert in_order(max_sequences=2) == [[0, 1], [2, 3], [4], [5], [6]]
    assert in_order(num_replicas=3, rank=0) == [[0, 1], [6]]
    assert in_order(num_replicas=3, rank=1) == [[2, 3, 4], [0, 1]]
    assert in_order(num_replicas=3, rank=2) == [[5], [2, 3, 4]]
    assert in_order(num_replicas=6, rank=5) == [[2, 3, 4]]
    assert in_order(num_replicas=3, rank=2, drop_last=True) == [[5]]
    assert TokenBudgetSampler([], 9).__len__() == 0


@pytest.mark.parametrize("padded", [False, True])
def test_epochs(padded):
    lengths = uniform(300)
    sampler = TokenBudgetSampler(lengths, 2048, padded=padded)
    before = random.getstate(), torch.get_rng_state()
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert len(second) == len(sampler) and second != first
    assert len({frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}) < 0.1 * len(first)
    assert list(TokenBudgetSampler(lengths, 2048, padded=padded, seed=1)) not in (first, second)
    sampler.set_epoch(0)
    next(iter(sampler)).clear()
    assert list(sampler) == first
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_an_epoch_is_the_same_in_every_process():
    """Ranks would otherwise take their batches from different lists."""
    assert list(TokenBudgetSampler([1, 2, 3, 4, 5, 6], 7, seed=5)) == [[5], [1, 3, 0], [2], [4]]


def test_iteration_goes_on_when_the_epoch_is_set():
    sampler = TokenBudgetSampler(uniform(100), 1024)
    first, iterator = list(sampler), iter(sampler)
    sampler.set_epoch(1)
    assert list(iterator) == first


@pytest.mark.parametrize(
    "max_tokens, padded, least", [(8192, False, 0.99), (8192, True, 0.95), (1024, False, 0.98), (1024, True, 0.84)]
)
def test_fill(max_tokens, padded, least):
    lengths = uniform(5000)
    sampler = TokenBudgetSampler(lengths, max_tokens, padded=padded)
    assert sum(lengths) / (len(sampler) * max_tokens) > least


@pytest.mark.parametrize("padded", [False, True])
def test_ranks_get_similar_batches_at_a_step(padded):
    lengths = random.Random(0).choices(range(1, 513), k=4000)
    options = dict(padded=padded, max_sequences=16, num_replicas=2)
    ranks = [TokenBudgetSampler(lengths, 8192, rank=rank, **options) for rank in range(2)]
    costs = [[cost([lengths[i] for i in batch], padded) for batch in sampler] for sampler in ranks]
    apart = sorted(abs(one - other) / max(one, other) for one, other in zip(*costs))
    assert sum(apart) / len(apart) < 0.02
    steps = [sum(step) for step in zip(*costs)]
    assert steps not in (sorted(steps), sorted(steps, reverse=True))


def work(lengths, padded, width):
    lengths = [max(lengths)] * len(lengths) if padded else lengths
    return sum(length + length**2 / (6 * width) for length in lengths)


@pytest.mark.parametrize("padded", [False, True])
def test_ranks_do_similar_work_at_a_step_of_long_sequences(padded):
    """A batch of one long sequence has the tokens of one of many short ones, and four times the work."""
    lengths = random.Random(0).choices([64, 256, 1024, 4096], [64, 16, 4, 1], k=4000)
    options = dict(padded=padded, num_replicas=4, width=256)
    ranks = [TokenBudgetSampler(lengths, 4096, rank=rank, **options) for rank in range(4)]
    steps = list(zip(*([work([lengths[i] for i in batch], padded, 256) for batch in sampler] for sampler in ranks)))
    waiting = sum(max(step) for step in steps) / sum(sum(step) / 4 for step in steps) - 1
    assert waiting < 0.03
    every = [one for step in steps for one in step]
    assert max(every) > 2 * min(every)


def test_batches_are_random_in_length():
    """No part of an epoch has mainly long or short sequences. Without padding, neither has a batch."""
    lengths = uniform(6000)
    mean = lambda batch: sum(lengths[i] for i in batch) / len(batch)
    for padded in (False, True):
        batches = list(TokenBudgetSampler(lengths, 4096, padded=padded))
        parts = [mean(sum(batches[i : i + 100], [])) for i in range(0, len(batches) - 100, 100)]
        assert max(parts) - min(parts) < (40, 80)[padded]
    means = [mean(batch) for batch in TokenBudgetSampler(lengths, 4096)]
    assert sum(abs(one - sum(lengths) / 6000) for one in means) / len(means) < 40


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([3, 9, 4, 8], 7), ValueError, r"lengths\[1\] is 9, and max_tokens=7"),
        (([3, 0], 7), ValueError, r"lengths\[1\] must be at least 1, got 0"),
        (([3, -2], 7), ValueError, r"lengths\[1\] must be at least 1, got -2"),
        (([3, 2.0], 7), TypeError, r"lengths\[1\] must be an integer, got 2.0"),
        (([True], 7), TypeError, r"lengths\[0\] must be an integer, got True"),
        ((torch.ones(3), 7), TypeError, r"lengths must be integers \(N,\), got torch.float32"),
        ((torch.ones(3, 1).long(), 7), TypeError, r"got torch.int64 of shape \(3, 1\)"),
        ((torch.tensor([1, 8]), 7), ValueError, r"lengths\[1\] is 8"),
        (([3], 0), ValueError, "max_tokens must be at least 1, got 0"),
        (([3], 7.5), TypeError, "max_tokens must be an integer, got 7.5"),
        (([3], 7, dict(max_sequences=0)), ValueError, "max_sequences must be at least 1"),
        (([3], 7, dict(num_replicas=0)), ValueError, "num_replicas must be at least 1"),
        (([3], 7, dict(num_replicas=2, rank=2)), ValueError, "rank must be less than num_replicas=2, got 2"),
        (([3], 7, dict(rank=-1)), ValueError, "rank must be at least 0"),
        (([3], 7, dict(width=0)), ValueError, "width must be at least 1, got 0"),
        (([3], 7, dict(seed="a")), TypeError, "seed must be an integer, got 'a'"),
    ],
)
def test_sampler_errors(arguments, error, message):
    lengths, max_tokens, options = (*arguments, {})[:3]
    with pytest.raises(error, match=message):
        TokenBudgetSampler(lengths, max_tokens, **options)


def test_epoch_must_be_an_integer():
    with pytest.raises(TypeError, match="epoch must be an integer, got None"):
        TokenBudgetSampler([3], 7).set_epoch(None)


def test_lengths_as_numpy_and_tensor():
    lengths = uniform(50)
    expected = list(TokenBudgetSampler(lengths, 1024))
    for other in (np.array(lengths), torch.tensor(lengths, dtype=torch.int32), tuple(lengths)):
        assert list(TokenBudgetSampler(other, 1024)) == expected


def check(batch, **expected):
    """The batch has the expected entries, values, dtypes and types."""
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, int):
            assert batch[name] == value and type(batch[name]) is int
        else:
            assert batch[name].dtype == value.dtype and torch.equal(batch[name], value), name


def packed(ids, starts, longest, **others):
    return dict(
        input_ids=torch.tensor(ids),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=longest,
        **{name: torch.tensor(value) for name, value in others.items()},
    )


@pytest.mark.parametrize("kind", [list, np.array, np.int32, torch.tensor], ids=["list", "numpy", "int32", "tensor"])
def test_tokens(kind):
    features = [
        dict(input_ids=kind([1, 5, 2]), token_type_ids=kind([0, 0, 1]), position_ids=kind([4, 5, 6])),
        UserDict(position_ids=kind([0]), input_ids=kind([7]), token_type_ids=kind([1])),
    ]
    expected = packed([1, 5, 2, 7], [0, 3, 4], 3, token_type_ids=[0, 0, 1, 1], position_ids=[4, 5, 6, 0])
    check(PackedCollator()(features), **expected)
    assert len(features[0]) == len(features[1]) == 3


def test_one_sequence_is_copied():
    ids = torch.tensor([1, 2])
    PackedCollator()([dict(input_ids=ids)])["input_ids"].zero_()
    assert ids.tolist() == [1, 2]


def test_padding_is_cut_off_everything():
    left = dict(input_ids=[0, 0, 1, 5, 2], attention_mask=[0, 0, 1, 1, 1], token_type_ids=[9, 9, 0, 1, 1])
    right = dict(input_ids=[1, 6, 0], attention_mask=[True, True, False], token_type_ids=[0, 2, 9])
    plain = dict(input_ids=[3, 4], token_type_ids=[5, 6])
    labels = [[-1, -1, 10, 11, 12], [13, 14, -1], [15, 16]]
    features = [dict(feature, labels=own) for feature, own in zip((left, right, plain), labels)]
    expected = packed([1, 5, 2, 1, 6, 3, 4], [0, 3, 5, 7], 3, token_type_ids=[0, 1, 1, 0, 2, 5, 6])
    check(PackedCollator()(features), **expected, labels=torch.arange(10, 17))


def test_holes_stay():
    features = [
        dict(input_ids=[0, 1, 5, 2, 0], attention_mask=[0, 1, 0, 1, 0]),
        dict(input_ids=[7, 8]),
        dict(input_ids=[9, 9], attention_mask=[2.5, 1.0]),
    ]
    check(PackedCollator()(features), **packed([1, 5, 2, 7, 8, 9, 9], [0, 3, 5, 7], 3, attention_mask=[1, 0, *[1] * 5]))


def test_positions_move_with_left_padding():
    features = [
        dict(input_ids=[0, 0, 1, 5, 2], attention_mask=[0, 0, 1, 1, 1], start_positions=2, end_positions=np.int64(4)),
        dict(input_ids=[1, 6, 0], attention_mask=[1, 1, 0], start_positions=torch.tensor([1]), end_positions=3),
        dict(input_ids=[1, 6], start_positions=-1, end_positions=2),
    ]
    positions = dict(start_positions=[0, 1, -1], end_positions=[2, 3, 2])
    check(PackedCollator()(features), **packed([1, 5, 2, 1, 6, 1, 6], [0, 3, 5, 7], 3, **positions))


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
@pytest.mark.parametrize(
    "labels, token_labels, expected",
    [
        ([1, 2], None, [1, 2]),
        ([np.int32(1), torch.tensor(2)], False, [1, 2]),
        ([1.5, 2.0], None, [1.5, 2.0]),
        ([1, 2.5], None, [1.0, 2.5]),
        ([[0, 1, 1, 0], [1, 0, 0, 0]], None, [[0, 1, 1, 0], [1, 0, 0, 0]]),
        ([[True] * 4, [False] * 4], None, [[1] * 4, [0] * 4]),
        ([[0, 1, 1], [-100, 4]], None, [0, 1, 1, -100, 4]),
        ([[0, 1, 1], [-100, 4]], True, [0, 1, 1, -100, 4]),
        ([[0.5, 1, 1], [2, 4]], True, [0.5, 1.0, 1.0, 2.0, 4.0]),
        ([[0, 1, 1], [1, 0, 0]], False, [[0, 1, 1], [1, 0, 0]]),
        ([[0.0, 1, 1], [1, 0, 0]], None, [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    ],
    ids=str,
)
def test_labels(labels, token_labels, expected, name):
    features = [{"input_ids": ids, name: own} for ids, own in zip(([1, 5, 2], [1, 2]), labels)]
    batch = PackedCollator(token_labels)(features)
    check(batch, **packed([1, 5, 2, 1, 2], [0, 3, 5], 3, labels=expected))


def test_float64_labels_stay():
    assert PackedCollator()([dict(input_ids=[1], labels=np.float64(0.1))])["labels"].tolist() == [0.1]


def test_a_vector_as_long_as_the_only_sequence():
    feature = dict(input_ids=[1, 5, 2], labels=[0, 1, 1])
    for token_labels, shape in ((None, (3,)), (True, (3,)), (False, (1, 3))):
        assert PackedCollator(token_labels)([feature])["labels"].shape == shape


@pytest.mark.parametrize(
    "features, error, message",
    [
        ([], ValueError, "at least one feature, got none"),
        ([[1, 2]], TypeError, r"features\[0\] must be a mapping of input_ids and so on, got list"),
        ([dict(input_ids=[1]), dict(labels=1)], ValueError, r"features\[1\] has no input_ids"),
        ([dict(input_ids=[1], text="a", idx=3)], ValueError, r"features\[0\] has text, idx: remove such columns"),
        (
            [dict(input_ids=[1]), dict(input_ids=[1], labels=1)],
            ValueError,
            r"\[0\] and features\[1\].* only one has lab",
        ),
        ([dict(input_ids=[1], label=1, labels=1)], ValueError, "has labels and label, which are the same"),
        ([dict(input_ids=[1], label=None)], TypeError, r"features\[0\]\['label'\] cannot become a tensor"),
        ([dict(input_ids=["a"])], TypeError, r"features\[0\]\['input_ids'\] cannot become a tensor"),
        ([dict(input_ids=[[1, 2]])], ValueError, r"input_ids'\] must be of shape \(L,\) .*, got \(1, 2\)"),
        ([dict(input_ids=[1]), dict(input_ids=[])], ValueError, r"features\[1\].* with L at least 1, got \(0,\)"),
        ([dict(input_ids=[1.0])], TypeError, r"features\[0\]\['input_ids'\] must be integers, got torch.float32"),
        ([dict(input_ids=[True])], TypeError, "must be integers, got torch.bool"),
        ([dict(input_ids=[1, 2], token_type_ids=[0])], ValueError, r"token_type_ids'\] must be \(2,\) .* got \(1,\)"),
        ([dict(input_ids=[1, 2], position_ids=[0, 1, 2])], ValueError, r"position_ids'\] must be \(2,\)"),
        ([dict(input_ids=[1, 2], attention_mask=[1] * 3)], ValueError, r"attention_mask'\] must be \(2,\)"),
        ([dict(input_ids=[1, 2], attention_mask=[0, 0])], ValueError, "has zeros only"),
        ([dict(input_ids=[1, 2], start_positions=[0, 1])], TypeError, "start_positions'] must be an integer"),
        ([dict(input_ids=[1, 2], end_positions=1.0)], TypeError, "end_positions'] must be an integer, got torch.float"),
        (
            [dict(input_ids=[0, 1, 2], attention_mask=[0, 1, 1], start_positions=0)],
            ValueError,
            r"features\[0\]\['start_positions'\] is 0, and the tokens are at 1 to 2",
        ),
        ([dict(input_ids=[1, 2, 0], attention_mask=[1, 1, 0], end_positions=2)], ValueError, "are at 0 to 1"),
        (
            [dict(input_ids=[1, 2, 3], labels=[1, 0, 1]), dict(input_ids=[1, 2], labels=[1, 0, 1])],
            ValueError,
            r"features\[0\] has as many labels as tokens, features\[1\] has not: say .*token_labels",
        ),
        ([dict(input_ids=[1, 2], labels=n) for n in ([1, 2], 1)], ValueError, r"features\[1\] has not"),
        ([dict(input_ids=[1, 2], labels=n) for n in ([1] * 3, 1)], ValueError, r"\(3,\) as those of .*, got \(\)"),
        (
            [dict(input_ids=[1, 2], labels=[1] * n) for n in (3, 4)],
            ValueError,
            r"\[1\] must be of shape \(3,\).*\(4,\)",
        ),
        ([dict(input_ids=[1, 2], labels=[[1, 2]])], ValueError, r"a number or a vector, got shape \(1, 2\)"),
    ],
)
def test_collator_errors(features, error, message):
    with pytest.raises(error, match=message):
        PackedCollator()(features)


def test_token_labels_must_be_one_a_token():
    features = [dict(input_ids=[1, 2], labels=[0, 1]), dict(input_ids=[1, 2], labels=[0, 1, 1])]
    with pytest.raises(ValueError, match=r"features\[1\] must be of shape \(2,\) as its input_ids are, got \(3,\)"):
        PackedCollator(token_labels=True)(features)
    with pytest.raises(ValueError, match=r"of shape \(2,\) as its input_ids are, got \(\)"):
        PackedCollator(token_labels=True)([dict(input_ids=[1, 2], labels=1)])
    with pytest.raises(ValueError, match="token_labels must be None, True or False, got 'yes'"):
        PackedCollator(token_labels="yes")


@pytest.mark.parametrize("workers", [0, 1])
def test_loader(workers):
    """The loader returns the sampler's batches in every epoch."""
    lengths = random.Random(1).choices(range(1, 20), k=40)
    dataset = [dict(input_ids=[i] * length, label=i) for i, length in enumerate(lengths)]
    sampler = TokenBudgetSampler(lengths, 64)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=PackedCollator(), num_workers=workers)
    for epoch in range(2 - workers):
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == len(sampler)
        assert [batch["labels"].tolist() for batch in batches] == list(sampler)
        for batch in batches:
            own = batch["labels"]
            assert batch["cu_seqlens"].diff().tolist() == [lengths[i] for i in own]
            assert torch.equal(batch["input_ids"], own.repeat_interleave(batch["cu_seqlens"].diff()))
            assert batch["max_seqlen"] == max(lengths[i] for i in own)


@torch.no_grad()
@pytest.mark.parametrize("head", ["SequenceClassification", "QuestionAnswering"])
def test_what_models_make_of_it(head):
    """The loss of a packed batch is the mean of the losses of its sequences alone, without padding."""
    model, inputs = build("v3", "For" + head), tokens("left", 20)
    features = [{name: x[row] for name, x in inputs.items()} for row in range(3)]
    alone = []
    for feature in features:
        first = int(feature["attention_mask"].argmax())
        own = {name: x[None, first:] for name, x in feature.items()}
        if head == "SequenceClassification":
            feature["label"] = first % 2
            alone.append(model(**own, labels=torch.tensor([first % 2])).loss)
        else:
            feature |= dict(start_positions=first + 1, end_positions=first + 3)
            alone.append(model(**own, start_positions=torch.tensor([1]), end_positions=torch.tensor([3])).loss)
    torch.testing.assert_close(model.forward_packed(**PackedCollator()(features)).loss, sum(alone) / 3)


def test_pickled():
    """Spawned workers get the collator and the sampler by pickle."""
    collator = pickle.loads(pickle.dumps(PackedCollator(token_labels=False)))
    assert collator([dict(input_ids=[1, 2], labels=[0, 1])])["labels"].shape == (1, 2)
    sampler = TokenBudgetSampler(uniform(20), 1024)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


def prepared(processes, rank, dispatch):
    from accelerate.data_loader import prepare_data_loader

    lengths = uniform(60)
    data = [{"input_ids": torch.full((length,), index)} for index, length in enumerate(lengths)]
    sampler = TokenBudgetSampler(lengths, 1500)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=PackedCollator())
    keywords = dict(dispatch_batches=dispatch, device=torch.device("cpu"), put_on_device=True)
    return sampler, prepare_data_loader(loader, num_processes=processes, process_index=rank, **keywords)


def told(sampler, loader):
    """The sequences of each batch of the loader."""
    return [x["input_ids"].unique().tolist() for x in loader]


def of_epoch(epoch, processes=1, rank=0):
    sampler = TokenBudgetSampler(uniform(60), 1500)
    sampler.set_epoch(epoch)
    batches = [sorted(batch) for batch in sampler]
    batches += batches[: -len(batches) % processes]
    return batches[rank::processes]


@pytest.mark.parametrize("processes, rank, dispatch", [(1, 0, False), (2, 0, False), (2, 1, False), (1, 0, True)])
def test_loaders_of_accelerate_tell_the_epoch(processes, rank, dispatch):
    """A loader counts epochs by itself, takes a given epoch, and tells the sampler also if batches are skipped."""
    pytest.importorskip("accelerate")
    from accelerate.data_loader import skip_first_batches

    sampler, loader = prepared(processes, rank, dispatch)
    assert [told(sampler, loader) for _ in range(3)] == [of_epoch(epoch, processes, rank) for epoch in range(3)]
    loader.set_epoch(7)
    assert told(sampler, loader) == of_epoch(7, processes, rank)
    # resumed: the new sampler does not know the epoch yet
    sampler, loader = prepared(processes, rank, dispatch)
    late = skip_first_batches(loader, 2)
    late.set_epoch(3)
    assert told(sampler, late) == of_epoch(3, processes, rank)[2:]
    loader.set_epoch(4)
    assert told(sampler, loader) == of_epoch(4, processes, rank)
    # without a loader, the sampler takes the epoch that its user sets
    sampler.set_epoch(9)
    assert [sorted(batch) for batch in sampler] == of_epoch(9)


def test_what_is_shared_out_already_is_not_shared_out_again():
    pytest.importorskip("accelerate")
    from accelerate.data_loader import prepare_data_loader

    sampler = TokenBudgetSampler(uniform(60), 1500, num_replicas=2, rank=1)
    loader = DataLoader(sampler.lengths, batch_sampler=sampler)
    loader = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
    with pytest.raises(ValueError, match="num_replicas must be 1 where accelerate shares the batches out, got 2"):
        next(iter(loader))
    del loader
    assert list(sampler)
