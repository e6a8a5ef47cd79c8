"""The Triton backend without a GPU: right in Triton's interpreter."""

import re
import sys

import pytest
from emulated import ROOT, run


def test_interpreted():
    """Another process compares every class of tile and mask, forward and backward, with the reference."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--durations=10"]
    status, output = run(*command, "triton_interpreted.py", TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    assert status == 0, output[-20000:]
    assert re.search(r"\d\d passed", output), output[-2000:]
