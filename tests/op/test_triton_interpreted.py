"""The Triton backend without a GPU: right in Triton's interpreter."""

import re
import sys

import pytest
from emulated import ROOT, run


@pytest.mark.parametrize("name, fewest", [("triton_interpreted", 10), ("triton_interpreted_parts", 5)])
def test_interpreted(name, fewest):
    """Another process compares every class of tile and mask, forward and backward, with the reference."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--durations=10"]
    status, output = run(*command, f"{name}.py", TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    assert status == 0, output[-20000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None and int(passed[1]) >= fewest, output[-2000:]
