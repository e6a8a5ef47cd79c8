"""The default backend on a GPU. ``make gpu``."""

import pytest
import torch
from gpu import DEVICE, FUSED, HALF_ONLY, pytestmark  # noqa: F401

import deberta_fast
from deberta_fast.op import backends, selection
from deberta_fast.op.problems import COMMON, Kind

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


@pytest.fixture(autouse=True)
def undecided():
    selection.set_backend_check(True)
    yield
    selection.set_backend_check(True)


def place(dtype):
    return selection.Place(torch.empty(0, device=DEVICE).device, dtype, 64)


def attention(dtype=torch.bfloat16, **arguments):
    query, key, value = torch.randn(3, 2, 12, 300, 64, dtype=dtype, device=DEVICE).unbind()
    tables = torch.randn(2, 12, 512, 64, dtype=dtype, device=DEVICE).unbind()
    return lambda: deberta_fast.disentangled_attention(query, key, value, *tables, **arguments)


@by_dtype
@pytest.mark.parametrize("kind", COMMON, ids=str)
def test_every_fused_backend_passes(kind, dtype):
    verdicts = selection.decide(place(dtype), kind).verdicts
    for name in FUSED:
        if dtype != torch.float32 or name not in HALF_ONLY:
            assert verdicts[name].passed, verdicts[name]


@by_dtype
def test_the_default_is_fused(dtype, monkeypatch):
    call = attention(dtype)
    call()
    taken = selection.decide(place(dtype), Kind()).order[0]
    used, forward = [], backends.BACKENDS[taken].forward
    monkeypatch.setattr(backends.BACKENDS[taken], "forward", lambda *args: (used.append(taken), forward(*args)))
    call()
    assert used == [taken] and taken in FUSED


def test_the_check_takes_little_memory():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for kind in COMMON:
        selection.decide(place(torch.bfloat16), kind)
    assert torch.cuda.max_memory_allocated() - before <= 300e6
    assert torch.cuda.memory_allocated() - before <= 1e6  # tables of distances


def test_a_capture_needs_one_call_before_it():
    call, graph = attention(), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="make one such call before the capture"), torch.cuda.graph(graph):
        call()
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()


def test_a_model_is_decided_when_it_is_moved():
    config = deberta_fast.DebertaV2Config(hidden_size=128, num_attention_heads=2, num_hidden_layers=1, vocab_size=50)
    deberta_fast.DebertaV2Model(config).eval().to(DEVICE, torch.bfloat16)
    assert [key[0].dtype for key in selection._decisions] == [torch.bfloat16]


def test_report():
    report = deberta_fast.check(DEVICE, dtypes=(torch.bfloat16,))
    assert report.passed and report.taken["bfloat16"].split(":")[0].split(",")[0] in FUSED
    assert {row.name for row in report.rows if row.milliseconds} >= {*FUSED, "eager", "SDPA"}
