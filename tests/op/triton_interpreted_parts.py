"""The Triton backend with parts of a call's rows, keys, heads and sequences, in Triton's interpreter.

``test_triton_interpreted.py`` runs this file in a process of its own, as it does ``triton_interpreted.py``.
"""

import pytest
import torch
from cases import Case
from comparison import compare
from interpreted import serve_cpu
from masks import assert_exact_divisor, assert_packed_parts_of_one_mask, assert_parts_of_one_mask
from parts import attention_in_parts, cut_at

serve_cpu()


def test_dropout_of_parts():
    """Calls with parts of the rows, keys, heads and sequences make the mask of one call."""
    assert_parts_of_one_mask("triton", torch.float32)
    assert_packed_parts_of_one_mask("triton", torch.float32)


def test_kept_probabilities_are_divided_by_what_is_kept():
    assert_exact_divisor("triton", torch.float32)


PARTS = {
    "uneven": (Case("", 70, 73, heads=1, batch=1, size=16), (30, 31)),
    "far": (Case("", 190, 190, heads=1, batch=1, size=16), (60,)),
    "rows-without-keys": (Case("", 70, 70, heads=1, batch=1, size=16, mask="pairwise"), (41,)),
    "dropout": (Case("", 70, 73, heads=1, size=16, mask="right", dropout_p=0.3), (40,)),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_the_keys_add_up(name):
    case, cuts = PARTS[name]
    draws = 2 if case.dropout_p else 1  # one draw is noisy where few pairs are left
    compare(attention_in_parts("triton", cut_at(*cuts)), case, torch.float32, draws)
