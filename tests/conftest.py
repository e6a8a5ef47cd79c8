import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# Small tensors: threads that wait for one another make these tests up to ten times slower.
torch.set_num_threads(1)


@pytest.fixture
def fused_calls(monkeypatch):
    """The backends that patched modules ask for, one a fused call."""
    import deberta_fast.hf

    calls, fused = [], deberta_fast.hf.attend
    counting = lambda *args, **kwargs: calls.append(kwargs["backend"]) or fused(*args, **kwargs)
    monkeypatch.setattr(deberta_fast.hf, "attend", counting)
    return calls


@pytest.fixture
def exact_scale(monkeypatch):
    """Hugging Face takes the root of the scale in float32: a float64 model of it would be right to 8 digits only."""
    from hf_models import V1, V2

    for module in (V1, V2):
        monkeypatch.setattr(
            module, "scaled_size_sqrt", lambda x, n: torch.tensor(float(x.size(-1) * n)).double().sqrt()
        )


class Interpreted:
    """``triton_interpreted.py`` in a process of its own, beside the other tests: it takes minutes."""

    def __init__(self):
        self.output = tempfile.TemporaryFile("w+")
        here = Path(__file__).parent
        command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--durations=10"]
        self.process = subprocess.Popen(
            [*command, "triton_interpreted.py"],
            cwd=here,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parent)},
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> tuple[int, str]:
        """Exit status and output."""
        status = self.process.wait()
        self.output.seek(0)
        return status, self.output.read()


_interpreted: list[Interpreted] = []


def pytest_collection_finish(session):
    if any(item.name == "test_interpreted" for item in session.items) and not session.config.option.collectonly:
        _interpreted.append(Interpreted())


def pytest_sessionfinish():
    for run in _interpreted:
        run.process.kill()


@pytest.fixture
def interpreted():
    """Exit status and output of the tests in Triton's interpreter."""
    return _interpreted[0].wait()
