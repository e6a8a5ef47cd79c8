import os

import pytest
import torch
from poison import poison_empty_memory

# The tensors are small: threads that wait for one another make these tests up to ten times slower. The variable limits
# NumPy's BLAS, whose threads wait busily, and the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

poison_empty_memory()

# pytest-xdist (make test) starts these files first: started last, one of them would run while the other workers idle.
LONGEST = ["test_triton_interpreted", "test_cuda", "test_gpu_script", "test_cuda_compiled", "test_triton"]


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def fused_calls(monkeypatch):
    """The backends that attention modules ask for, one per fused call."""
    from deberta_fast.models import attention

    calls, fused = [], attention.attend
    counting = lambda *args, **kwargs: calls.append(kwargs["backend"]) or fused(*args, **kwargs)
    monkeypatch.setattr(attention, "attend", counting)
    return calls


@pytest.fixture
def exact_hf(monkeypatch):
    """Hugging Face takes the root of the scale and v1's norms in float32: a float64 model of it would be right to 8
    digits only."""
    from hf_models import V1, V2

    own = V1.DebertaLayerNorm.forward

    def norm(module, x):
        if x.dtype != torch.float64:
            return own(module, x)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.variance_epsilon)

    norm.__module__ = V1.__name__  # as if it were Hugging Face's own
    monkeypatch.setattr(V1.DebertaLayerNorm, "forward", norm)

    for module in (V1, V2):
        monkeypatch.setattr(
            module, "scaled_size_sqrt", lambda x, n: torch.tensor(float(x.size(-1) * n)).double().sqrt()
        )
