"""TokenBudgetSampler resumes in the middle of an epoch, whatever the loader."""

import json
import pickle

import pytest
import torch
from sequence_lengths import uniform
from torch.utils.data import DataLoader

from deberta_fast.data import TokenBudgetSampler


def resumed(sampler, after):
    """The batches that a new sampler gives with the state of one that gave out ``after`` of them."""
    iterator = iter(sampler)
    for _ in range(after):
        next(iterator)
    state = json.loads(json.dumps(sampler.state_dict()))
    assert (state["epoch"], state["batches"]) == (sampler.epoch, after)
    again = pickle.loads(pickle.dumps(sampler))
    again.set_epoch(0)
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.set_epoch(sampler.epoch)
    return list(again), again


@pytest.mark.parametrize("options", [{}, dict(padded=True), dict(shuffle=False), dict(num_replicas=2, rank=1)], ids=str)
def test_an_epoch_continues_in_its_middle(options):
    sampler = TokenBudgetSampler(uniform(60), 1500, **options)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        everything = list(sampler)
        for after in (0, 1, 5, len(everything)):
            rest, again = resumed(sampler, after)
            assert rest == everything[after:] and len(again) == len(everything)
            assert list(again) == everything  # once only
    again.load_state_dict(sampler.state_dict() | {"batches": 4})
    again.set_epoch(4)
    assert again.state_dict()["batches"] == 0
    sampler.set_epoch(4)
    assert list(again) == list(sampler)


def test_the_state_is_the_same_on_all_ranks():
    ranks = [TokenBudgetSampler(uniform(60), 1500, num_replicas=2, rank=rank) for rank in range(2)]
    iterators = [iter(sampler) for sampler in ranks]
    for _ in range(3):
        assert [next(iterator) for iterator in iterators]
    assert ranks[0].state_dict() == ranks[1].state_dict()
    ranks[0].set_epoch(1)
    next(iterators[0])  # an iteration of the epoch before no longer counts
    assert ranks[0].state_dict()["batches"] == 0


def test_states_that_do_not_fit():
    make = lambda **options: TokenBudgetSampler(**{"lengths": [3, 4, 5], "max_tokens": 9, **options})
    state = make().state_dict()
    for options, message in (
        (dict(seed=1), "with seed=1, got one with 0"),
        (dict(max_tokens=10), "with max_tokens=10, got one with 9"),
        (dict(num_replicas=2), "with num_replicas=2, got one with 1"),
        (dict(lengths=[3, 4, 6]), "with tokens=13, got one with 12"),
        (dict(lengths=[3, 9]), "with sequences=2, got one with 3"),
    ):
        with pytest.raises(ValueError, match=f"state_dict must be of a sampler {message}"):
            make(**options).load_state_dict(state)
    with pytest.raises(ValueError, match="batches must be at most the 2 of epoch 0, got 3"):
        make().load_state_dict(state | {"batches": 3})
    with pytest.raises(ValueError, match="batches must be at least 0, got -1"):
        make().load_state_dict(state | {"batches": -1})
    with pytest.raises(ValueError, match="got one without batches, settings"):
        make().load_state_dict({"epoch": 0})


def loaded(sampler, workers, kind=DataLoader, **options):
    data = [torch.full((length,), index) for index, length in enumerate(sampler.lengths)]
    collate = lambda rows: [int(row[0]) for row in rows]
    return kind(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers, **options)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_no_batch_and_take_some_ahead(workers):
    """The sampler counts ahead of the loop if there are workers; the loop's own count is exact."""
    sampler = TokenBudgetSampler(uniform(60), 1500)
    everything = list(sampler)
    loader = loaded(sampler, workers)
    assert list(loader) == everything
    iterator = iter(loader)
    assert [next(iterator) for _ in range(4)] == everything[:4]
    state = sampler.state_dict()
    assert state["batches"] == min(len(everything), 4 + 2 * workers)
    del iterator
    sampler.load_state_dict(state | {"batches": 4})
    assert list(loaded(sampler, workers)) == everything[4:]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader(workers):
    """torchdata's loader saves the sampler's state as of the batch that it returned last."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    make = lambda: TokenBudgetSampler(uniform(60), 1500)
    sampler = make()
    sampler.set_epoch(2)
    everything = list(sampler)
    loader = loaded(sampler, workers, torchdata.StatefulDataLoader)
    iterator = iter(loader)
    assert [next(iterator) for _ in range(5)] == everything[:5]
    state = loader.state_dict()
    del iterator
    again = loaded(make(), workers, torchdata.StatefulDataLoader)
    again.load_state_dict(state)
    assert list(again) == everything[5:]
    assert list(again) == everything
