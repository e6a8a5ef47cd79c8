"""On a CUDA device: the native models, as precise there as Hugging Face's eager code. ``make gpu``."""

import copy

import pytest
import torch
from test_gpu import DEVICE, FUSED, HALF_ONLY, pytestmark  # noqa: F401

import deberta_fast

hf_models = pytest.importorskip("hf_models")


@pytest.mark.parametrize("backend", ["eager", *FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_native_model(name, dtype, backend):
    if dtype == torch.float32 and backend in HALF_ONLY:
        pytest.skip(f"{backend} has no float32")
    theirs = hf_models.build(name, "ForSequenceClassification").to(DEVICE, dtype)
    kind = "DebertaForSequenceClassification" if name == "v1" else "DebertaV2ForSequenceClassification"
    kind = getattr(deberta_fast, kind)
    config = kind.config_class.from_dict(theirs.config.to_dict())
    ours = kind.from_pretrained(None, config=config, state_dict=theirs.state_dict(), dtype=dtype, device=DEVICE)
    ours.set_backend(backend)
    draws = [{key: x.to(DEVICE) for key, x in hf_models.tokens("right", seed=seed).items()} for seed in range(6)]
    run = lambda model: [hf_models.results(model, inputs) for inputs in draws]
    exact, eager, got = run(copy.deepcopy(theirs).double()), run(theirs), run(ours)
    # v1's projections lie in other tensors, with the same numbers
    shared = [x for x, grad in exact[0][1].items() if grad is not None and got[0][1].get(x) is not None]
    flat = ([[*outputs, *(grads[x] for x in shared)] for outputs, grads in runs] for runs in (got, eager, exact))
    hf_models.assert_as_precise(*flat)
