"""The Triton backend on GPUs of AMD and Intel, and on old ones: kernels compiled for AMD without a GPU, refusals."""

from types import SimpleNamespace

import pytest
import torch
from cases import Case, make_inputs

pytest.importorskip("triton")

from triton.backends import backends as compilers  # noqa: E402

from bench.compile_report import compile_all, plan_launches  # noqa: E402
from deberta_fast.op.backends import gpu, triton  # noqa: E402
from deberta_fast.op.backends.triton import configuration  # noqa: E402

LOCAL_MEMORY = 64 << 10  # bytes that a workgroup may ask for, on both
KERNELS = {
    "prepare", "band_scores", "forward", "backward_prepare", "backward_key", "backward_query", "backward_rows",
    "backward_by_distance", "backward_by_row",
}  # fmt: skip
CALLS = {
    "gfx942": {
        "dense": dict(size=64, dtype=torch.bfloat16),
        "pairs-dropout": dict(size=64, dtype=torch.float16, mask="pairs", dropout_p=0.1),
        "packed": dict(size=64, dtype=torch.float32, packed=True),
        "head-size-128": dict(size=128, dtype=torch.bfloat16),
    },
    "gfx90a": {
        "keys": dict(size=64, dtype=torch.bfloat16, mask="keys"),
        "packed-dropout": dict(size=64, dtype=torch.float16, packed=True, dropout_p=0.1),
    },
}


def launches(architecture):
    for name, call in CALLS[architecture].items():
        yield from plan_launches(name, architecture, **call)


@pytest.mark.skipif("amd" not in compilers, reason="this Triton does not compile for AMD")
def test_compiles_for_amd():
    """All kernels fit, and nothing is spilled."""
    compiled = compile_all(launches, CALLS)
    made = {architecture: {label.split()[1] for label, a in compiled if a == architecture} for architecture in CALLS}
    assert made == dict.fromkeys(CALLS, KERNELS)
    assert len(compiled) == len(KERNELS) * sum(map(len, CALLS.values()))
    assert {key: x.shared for key, x in compiled.items() if x.shared > LOCAL_MEMORY} == {}
    assert {key: x for key, x in compiled.items() if x.stack or x.spill_stores} == {}
    # A SIMD has 512 registers per lane, so two wavefronts of forward run at once.
    assert compiled["dense forward", "gfx942"].registers <= 256


@pytest.fixture
def device(monkeypatch):
    """Makes torch find a GPU: device(hip="7.0", name=..., major=...)."""

    def found(hip=None, **properties):
        monkeypatch.setattr(torch.version, "hip", hip)
        for library in (torch.cuda, torch.xpu):
            monkeypatch.setattr(library, "get_device_properties", lambda device: SimpleNamespace(**properties))
        configuration.target_of.cache_clear()

    yield found
    configuration.target_of.cache_clear()


def test_served_devices(device):
    on = lambda name: triton.device_reasons(torch.device(name))
    device(major=7, minor=5)
    assert on("cuda:0") == ["compute capability must be at least (8, 0), got (7, 5)"]
    device(major=8, minor=0)
    assert on("cuda:0") == []
    device(hip="7.0", major=9, minor=0)
    assert on("cuda:0") == []
    device()
    assert on("xpu:0") == []
    for name in ("mps:0", "meta", "cpu"):
        assert on(name) == [f"tensors must be on an NVIDIA, AMD or Intel GPU, got {name}"]


@pytest.mark.parametrize("name", ["cuda:0", "cuda:77", "xpu:77"])
def test_devices_that_are_not_there(name):
    if torch.get_device_module(name).is_available() and name == "cuda:0":
        pytest.skip("it is there")
    device = torch.device(name)
    assert gpu.properties_of(device) is None
    assert triton.device_reasons(device) == [f"torch finds no device {name}"]


def test_a_fake_tensor_is_refused_with_reasons():
    """torch.compile traces the refusal too."""
    inputs = make_inputs(Case("", 5, 5, size=16), torch.bfloat16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(inputs.query.shape, dtype=torch.bfloat16, device="cuda")
    reasons = lambda x: (triton.device_reasons(x.device), x + 1)[0]
    expected = [] if torch.cuda.is_available() else ["torch finds no device cuda:0"]
    assert triton.why_not(inputs._replace(query=query)) == expected
    meta = torch.empty(2, device="meta")
    assert torch.compile(reasons, backend="eager", fullgraph=True)(meta)[0].endswith("got meta")


def test_targets(device):
    """A configuration is chosen by its target."""
    target = lambda name: configuration.target_of(torch.device(name), 64, 2)
    device(hip="7.0", name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4)
    assert target("cuda:0") == configuration.Target("gfx942", 64, 2)
    device(name="Intel(R) Data Center GPU Max 1550")
    assert target("xpu:0") == configuration.Target("xpu", 64, 2)
    device(name="NVIDIA H200", major=9, minor=0)
    assert target("cuda:0") == configuration.Target(90, 64, 2)


@pytest.mark.parametrize("hip, precision", [(None, "tf32"), ("7.0", "ieee")])
def test_tf32_is_nvidias(hip, precision, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    # monkeypatch would delete this, since it is not an ordinary attribute.
    usual = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        query = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"))
        assert triton._precision(SimpleNamespace(query=query)) == precision
        query.device = torch.device("xpu:0")
        assert triton._precision(SimpleNamespace(query=query)) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = usual
