"""Builds the CUDA kernels for an emulator on the CPU (tests/emulator), and makes the CUDA backend use them."""

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build/emulated"
TORCH = Path(torch.__file__).parent
# register.cpp of the emulator replaces that of the GPU.
SOURCES = [
    *sorted(path for path in (ROOT / "csrc/cuda").glob("*.c*") if path.name != "register.cpp"),
    *(ROOT / "tests/emulator" / name for name in ("options.cpp", "register.cpp")),
]
HEADERS = [path for folder in ("csrc", "csrc/cuda", "tests/emulator") for path in (ROOT / folder).glob("*.h")]
FLAGS = [
    *"-x c++ -std=c++17 -fPIC -fvisibility=hidden -g1".split(),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *(f"-I{ROOT / folder}" for folder in ("tests/emulator", "csrc/cuda")),
    *("-isystem", TORCH / "include"),
]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
BUILDS = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-fno-omit-frame-pointer", *SANITIZERS],
}


def run(*command, timeout=900, **environment) -> tuple[int, str]:
    """Runs a command and returns its exit status and output."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, cwd=ROOT / "tests/op",
        env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, done.stdout


def built(name: str, pool: ThreadPoolExecutor) -> Path:
    """Returns the library of the kernels and the emulator, built with BUILDS[name]."""
    compiler, folder = ["g++", *BUILDS[name]], BUILT / name
    make_one = lambda source: _made(
        folder / f"{source.name}.o", [source, *HEADERS], *compiler, *FLAGS, "-c", source
    )  # fmt: skip
    objects = list(pool.map(make_one, SOURCES))
    link = [*compiler, "-shared", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    return _made(folder / "libemulated.so", objects, *link)


def _made(target: Path, sources: list[Path], *command) -> Path:
    """Returns the command's output file, built again if the command or its sources have changed."""
    key = hashlib.sha256(repr(command).encode())
    for path in sources:
        key.update(path.read_bytes())
    kept, partial = target.with_suffix(".key"), target.with_suffix(f".{os.getpid()}")
    if not target.exists() or not kept.exists() or kept.read_text() != key.hexdigest():
        target.parent.mkdir(parents=True, exist_ok=True)
        status, output = run(*command, "-o", partial)
        assert status == 0, output
        partial.rename(target)
        kept.write_text(key.hexdigest())
    return target


def load(library: Path | str):
    """Loads the library and makes the CUDA backend run it on CPU tensors. The caller must keep the result alive."""
    from deberta_fast.op.backends import cuda, extension

    defined = torch.library.Library("deberta_fast_emulated", "DEF")
    for schema in extension.SCHEMAS:
        defined.define(schema)
    torch.ops.load_library(library)
    operators = torch.ops.deberta_fast_emulated
    stand_in(cuda)
    cuda.extension = SimpleNamespace(
        fused_forward=operators.fused_forward.default,
        fused_backward=operators.fused_backward.default,
        arguments=extension.arguments,
    )
    return defined


def stand_in(cuda, patch=setattr) -> None:
    """Makes the CUDA backend accept CPU tensors as if they were on a GPU."""
    device_reasons = cuda.device_reasons
    patch(cuda, "MISSING", None)
    patch(cuda, "device_reasons", lambda device, size: [] if device.type == "cpu" else device_reasons(device, size))
