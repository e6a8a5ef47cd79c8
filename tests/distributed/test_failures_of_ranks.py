"""After an error that all processes share, their group goes on working."""

import time
from datetime import timedelta

import pytest
import torch
from cases import BY_NAME, make_inputs
from processes import Processes
from shared_attention import Way, backward_of_rank, forward_of_rank

from deberta_fast.op import backends

TIMEOUT = 20  # seconds of the processes' second group


@pytest.fixture(scope="module")
def processes():
    with Processes(3) as pool:
        yield pool


def of_two_groups(function):
    """Runs a function in a group that gives up early, and then looks whether all can still add."""
    dist = torch.distributed
    group, dist.group.WORLD = dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    try:
        said = function()
        total = torch.full((3,), dist.get_rank() + 1.0)
        dist.all_reduce(total, group=dist.group.WORLD)
    finally:
        dist.group.WORLD = group
    return said, total


def fails(pass_, step):
    """One pass fails in one step on all ranks, on each one later than on the one before it."""

    def run():
        own, made = getattr(backends, pass_), []

        def failing(*args, **kwargs):
            made.append(None)
            if len(made) <= step:
                return own(*args, **kwargs)
            time.sleep(0.5 * torch.distributed.get_rank())
            raise RuntimeError("no memory left")

        case = make_inputs(BY_NAME["ragged-L129-D64"], torch.float32)
        setattr(backends, pass_, failing)
        try:
            output, lse = forward_of_rank(case, Way("ring"))
            return backward_of_rank(torch.ones_like(case.query), torch.ones_like(case.query[..., 0]))
        except RuntimeError as error:
            return str(error)
        finally:
            setattr(backends, pass_, own)

    return of_two_groups(run)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_an_error_leaves_no_transfer_behind(pass_, step, processes):
    for said, total in processes.run(fails, pass_, step):
        assert said == "no memory left" and torch.equal(total, torch.full((3,), 6.0))
