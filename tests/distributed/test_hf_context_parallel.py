"""Patched models whose sequences several processes share, against one process with whole sequences."""

import pytest
from processes import Processes
from shared_models import CASES, check, check_inference

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pools():
    with Processes(2) as two, Processes(3) as three:
        yield {pool.number: pool for pool in (two, three)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rings_of_three(case, pools):
    check(pools[3], "patched", "ring", *case)


@pytest.mark.parametrize("case", CASES[1::3], ids=str)
@pytest.mark.parametrize("method", ["gather", "heads"])
def test_other_methods_of_two(method, case, pools):
    check(pools[2], "patched", method, *case)


@pytest.mark.parametrize("layout", ["holes", "packed"])
def test_inference(layout, pools):
    check_inference(pools[2], "patched", layout)
