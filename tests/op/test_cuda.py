"""The CUDA backend without a GPU: its kernels on an emulator (tests/emulator), their index arithmetic, its refusals."""

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from cases import BY_NAME, Case, make_inputs
from emulated import BUILDS, ROOT, SANITIZERS, built, run, stand_in

from deberta_fast import disentangled_attention
from deberta_fast.op import selection
from deberta_fast.op.backends import cuda

FILES = ("cuda_emulated.py", "cuda_emulated_memory.py")
# The tests of these files that run under sanitizers.
SOME = (
    "L7 or one-token or ragged or far-L700 or D80 or D104 or L127 or odd or corner or masked or hidden_tiles or beyond"
)

needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ on Linux"
)


@pytest.fixture(scope="module")
def emulated():
    """Runs all tests of FILES, and some of them under sanitizers, in two processes."""
    with ThreadPoolExecutor(2) as pool:
        libraries = {name: built(name, pool) for name in BUILDS}
        asan, more = run("g++", "-print-file-name=libasan.so")[1].strip(), {}
        command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--durations=10"]
        started = {}
        for name, library in libraries.items():
            more, which = dict(PYTHONPATH=str(ROOT), EMULATED_LIBRARY=str(library)), []
            if name == "sanitized":
                more |= dict(LD_PRELOAD=f"{asan} libstdc++.so.6", ASAN_OPTIONS="detect_leaks=0")
                more |= dict(UBSAN_OPTIONS="print_stacktrace=1", NEAR_BYTES="1")
                which = ["--capture=sys", "-k", SOME]
            started[name] = pool.submit(run, *command, *which, *FILES, **more)
        yield started


@needs_compiler
@pytest.mark.parametrize("name", BUILDS)
def test_emulated(name, emulated):
    """Kernels equal the reference and have no races for every class of tile and mask, forward and backward."""
    status, output = emulated[name].result()
    assert status == 0, output[-20000:]
    assert re.search(r"\d\d passed", output), output[-2000:]


@needs_compiler
@pytest.mark.parametrize("flags", [["-O2"], ["-O1", *SANITIZERS]], ids=BUILDS)
@pytest.mark.parametrize("name", ["emulator_test", "fragments_test", "races_test", "skew_test", "plan_test"])
def test_programs(name, flags, tmp_path):
    """The emulator finds errors in kernels, and the kernels' index arithmetic is right at all indices."""
    source = ROOT / f"tests/emulator/{name}.cpp"
    warnings = "-std=c++17 -Wall -Wextra -Werror".split()
    folders = [f"-I{ROOT / folder}" for folder in ("tests/emulator", "csrc/cuda")]
    assert run("g++", *flags, *warnings, *folders, source, "-o", tmp_path / name) == (0, "")
    assert run(tmp_path / name) == (0, "ok\n")


REASONS = {
    "dtype must be bfloat16 or float16, got torch.float32": (Case("", 5, 5, size=16), torch.float32),
    "head size must be a multiple of 8 up to 128, got 136": (Case("", 5, 5, size=136), torch.bfloat16),
    "head size must be a multiple of 8 up to 128, got 20": (Case("", 5, 5, size=20), torch.bfloat16),
    "a mask must be the same for all heads and queries, (B, 1, 1, Lk), got (1, 3, 70, 70)": (
        BY_NAME["mask-per-head-L70"],
        torch.bfloat16,
    ),
    "a mask must be the same for all heads and queries, (B, 1, 1, Lk), got (1, 1, 150, 150)": (
        BY_NAME["block-diagonal-mask-L150"],
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_refuses_with_reasons(reason, monkeypatch):
    """Each call has exactly one reason, since the emulator stands in for the missing GPU."""
    stand_in(cuda, patch=monkeypatch.setattr)
    case, dtype = REASONS[reason]
    assert cuda.why_not(make_inputs(case, dtype)) == [reason]


def test_more_reasons(monkeypatch):
    stand_in(cuda, patch=monkeypatch.setattr)
    inputs = make_inputs(Case("", 5, 5, size=16), torch.bfloat16)
    assert cuda.why_not(inputs) == []
    assert cuda.why_not(inputs._replace(scale=-1.0)) == ["scale must be positive, got -1.0"]
    assert cuda.why_not(inputs._replace(query_offset=-(2**28)))[0].startswith("lengths and query_offset must be below")
    assert cuda.why_not(inputs._replace(query=inputs.query.to("meta"))) == [
        "tensors must be on an NVIDIA GPU, got meta"
    ]


RUNS_ON = {
    # built architectures: {(major, minor) of a GPU: whether it runs them}
    ("sm_80", "sm_90"): {(8, 0): True, (8, 9): True, (9, 0): True, (10, 0): False, (12, 0): False},
    ("sm_86", "compute_86"): {(8, 0): False, (8, 6): True, (9, 0): True, (12, 1): True},
    ("sm_90a", "compute_90a"): {(8, 9): False, (9, 0): True, (10, 0): False},
    ("sm_100f", "compute_100f"): {(10, 0): True, (10, 3): True, (9, 0): False, (12, 0): False},
    (): {(9, 0): True},  # MISSING reports that there are no kernels
}


@pytest.mark.parametrize("built", RUNS_ON)
def test_a_gpu_that_the_kernels_were_not_built_for(built, monkeypatch):
    monkeypatch.setattr(cuda, "ARCHITECTURES", list(built))
    monkeypatch.setattr(cuda, "RUN_ON", [cuda._capabilities(name) for name in built])
    for (major, minor), runs in RUNS_ON[built].items():
        gpu = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=1 << 20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        none = (
            f"the kernels were built for {', '.join(built)}, none of which runs on a GPU of capability {major, minor}"
        )
        assert cuda.device_reasons(torch.device("cuda:0"), 64) == ([] if runs else [none])


def test_old_and_small_gpus(monkeypatch):
    monkeypatch.setattr(cuda, "RUN_ON", [])
    gpu = SimpleNamespace(major=7, minor=5, shared_memory_per_block_optin=64 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    old = "compute capability must be at least (8, 0), got (7, 5)"
    small = "head size 64 needs 101376 bytes of shared memory a block, the GPU has 65536"
    assert cuda.device_reasons(torch.device("cuda:0"), 64) == [old, small]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    """The device of a FakeTensor need not exist. torch.compile traces why_not."""
    device = torch.device("cuda:0")
    assert cuda.device_reasons(device, 64) == ["torch finds no device cuda:0"]
    reasons = lambda x: (x + 1, cuda.device_reasons(device, 64))
    assert torch.compile(reasons, backend="eager", fullgraph=True)(torch.ones(1))[1] == cuda.device_reasons(device, 64)


def test_architectures():
    """A build with CUDA kernels lists binaries and perhaps PTX; other builds list no binaries."""
    built = cuda.architectures()
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in built)
    kernels = cuda.NOT_LOADED is None and cuda.implements("fused_forward", "CUDA")
    assert any(name.startswith("sm_") for name in built) == kernels


def test_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "NOT_LOADED", None)
    monkeypatch.setattr(cuda, "implements", lambda *_: False)
    monkeypatch.setattr(cuda, "MISSING", cuda._missing())
    inputs = make_inputs(Case("", 5, 5, size=16), torch.bfloat16)
    not_built, elsewhere = cuda.why_not(inputs)
    assert not_built == "the extension deberta_fast._C was built without CUDA kernels (pip install -v says why)"
    assert elsewhere == "tensors must be on an NVIDIA GPU, got cpu"
    with pytest.raises(RuntimeError) as refusal:
        disentangled_attention(*inputs[:3], backend="cuda")
    assert str(refusal.value) == f"backend 'cuda' cannot serve this call: {not_built}, {elsewhere}"


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(cuda, "NOT_LOADED", "the extension deberta_fast._C was not built (pip install -v says why)")
    monkeypatch.setattr(cuda, "MISSING", cuda._missing())
    assert cuda.why_not(make_inputs(BY_NAME["one-token"], torch.bfloat16))[0] == cuda.NOT_LOADED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_no_default_on_a_cpu(dtype, monkeypatch):
    """The default is another backend even where cuda could serve the call."""
    monkeypatch.setattr(cuda, "why_not", lambda inputs: [])
    for case in ("one-token", "ragged-L129-D64", "pairwise-mask-L150"):
        assert selection.choose(None, make_inputs(BY_NAME[case], dtype)) in ("cpu", "eager")
