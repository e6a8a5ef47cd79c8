"""The device and the backends that tests of GPUs run."""

import pytest
import torch

from deberta_fast import backends

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ELSEWHERE = ("reference", "cpu") if torch.version.hip is None else ("reference", "cpu", "cuda")
BACKENDS = [name for name in backends.BACKENDS if name not in ELSEWHERE]
FUSED = [name for name in BACKENDS if name in ("cuda", "triton")]
HALF_ONLY = ("cuda",)
