"""``patch`` checks the backends for a half-precision model before the first call."""

import pytest
import torch
from stand_ins import FAULTS, StandIn, cpu_as_accelerator

import deberta_fast
from deberta_fast.op import selection
from deberta_fast.op.problems import Kind

hf_models = pytest.importorskip("hf_models")


@pytest.fixture
def stand_ins():
    """A correct backend, triton, and a wrong one, cuda."""
    with cpu_as_accelerator(cuda=1.0, triton=1.0) as install:
        yield install(cuda=StandIn(FAULTS["a wrong slot"][0]))


@pytest.mark.parametrize("name, kind", [("v1", Kind(mask="keys")), ("v3", Kind(mask="keys")), ("v2", None)])
def test_patch_decides(name, kind, stand_ins, recwarn):
    model = hf_models.build(name).to(torch.bfloat16)
    deberta_fast.patch(model)
    decided = [key[1] for key in selection._decisions]
    assert len(decided) == 1 and decided[0] == (kind or decided[0])
    failed = [str(w.message) for w in recwarn if "failed its check" in str(w.message)]
    assert len(failed) == 1 and "'cuda' failed" in failed[0] and "takes 'triton'" in failed[0]
    before = stand_ins.triton.calls
    inputs = hf_models.tokens("right")
    with torch.no_grad():
        model(**inputs)
    assert stand_ins.triton.calls == before + model.config.num_hidden_layers
    assert [key[1] for key in selection._decisions] == decided  # the call was of the expected kind


def test_patch_waits_where_nothing_is_certain(stand_ins):
    """A float32 model may run under autocast, and a backend that the user names is not checked."""
    deberta_fast.patch(hf_models.build("v3"))
    deberta_fast.patch(hf_models.build("v3").to(torch.bfloat16), "eager")
    assert not selection._decisions
