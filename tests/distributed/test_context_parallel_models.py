"""Native models whose sequences several processes share, against one process with whole sequences."""

import pytest
from processes import Processes
from shared_models import CASES, check, check_inference

# Hugging Face's models lack these.
NATIVE = [
    ("v3-conv", "Model", "holes", {}),
    ("v3-conv", "ForMaskedLM", "packed", {}),
    ("v3", "ForQuestionAnswering", "packed", {}),
    ("v3", "ForMaskedLM", "right", {"enhanced_mask_decoder": True}),
    ("v3", "ForMaskedLM", "packed", {"enhanced_mask_decoder": True}),
    ("v2", "Model", "right", {"z_steps": 2}),
]


@pytest.fixture(scope="module")
def pools():
    with Processes(2) as two, Processes(3) as three:
        yield {pool.number: pool for pool in (two, three)}


@pytest.mark.parametrize("case", [*CASES, *NATIVE], ids=str)
def test_rings_of_three(case, pools):
    check(pools[3], "native", "ring", *case)


@pytest.mark.parametrize("case", [*CASES[::2], *NATIVE[::2]], ids=str)
@pytest.mark.parametrize("number, method", [(2, "gather"), (2, "heads"), (3, "heads")])
def test_other_methods(number, method, case, pools):
    check(pools[number], "native", method, *case)


@pytest.mark.parametrize("layout", ["holes", "packed"])
def test_inference(layout, pools):
    check_inference(pools[2], "native", layout)
