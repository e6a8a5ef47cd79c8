"""The device and the backends that tests of GPUs run."""

from dataclasses import replace

import pytest
import torch
from cases import BY_NAME

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
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_fused_backend = pytest.mark.parametrize("backend", FUSED)
TABLE = dict(position_buckets=16, max_relative_positions=32)


def on_device(name_or_case, **changes):
    case = BY_NAME[name_or_case] if isinstance(name_or_case, str) else name_or_case
    return replace(case, device=DEVICE, **changes)


def usual_dtype(backend):
    """The dtype for tests that are not about dtypes."""
    return torch.bfloat16 if backend in HALF_ONLY else torch.float32


def normal(*shape, dtype=torch.float32, seed=0):
    random = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, dtype=dtype, device=DEVICE, generator=random)
