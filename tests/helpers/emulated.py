"""The CUDA backend where an emulator (tests/emulator) makes up for the GPU that is not there: built, loaded, put in."""

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build/emulated"
TORCH = Path(torch.__file__).parent
SOURCES = [
    *sorted((ROOT / "csrc/cuda").glob("*.c*")),
    ROOT / "tests/emulator/options.cpp",
]
HEADERS = [path for folder in ("csrc", "csrc/cuda", "tests/emulator") for path in (ROOT / folder).glob("*.h")]
FLAGS = [
    *"-x c++ -std=c++17 -fPIC -fvisibility=hidden -g1".split(),
    *"-DTORCH_TARGET_VERSION=0x020b000000000000 -DDEBERTA_FAST_EMULATED".split(),
    *(f"-I{ROOT / folder}" for folder in ("tests/emulator", "csrc/cuda")),
    *("-isystem", TORCH / "include"),
]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
# Under sanitizers, backward takes one head after the other, as it does where dA of more would be too much.
BUILDS = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-fno-omit-frame-pointer", *SANITIZERS, "-DDEBERTA_FAST_NEAR_BYTES=1"],
}


def run(*command, timeout=900, **environment) -> tuple[int, str]:
    """Exit status and output."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, cwd=ROOT / "tests/op",
        env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, done.stdout


def built(name: str, pool: ThreadPoolExecutor) -> Path:
    """A library of the kernels and the emulator, by the flags of that name."""
    compiler, folder = ["g++", *BUILDS[name]], BUILT / name
    make_one = lambda source: _made(
        folder / f"{source.name}.o", [source, *HEADERS], *compiler, *FLAGS, "-c", source
    )  # fmt: skip
    objects = list(pool.map(make_one, SOURCES))
    link = [*compiler, "-shared", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    return _made(folder / "libemulated.so", objects, *link)


def _made(target: Path, sources: list[Path], *command) -> Path:
    """The command's result, made anew if it or its sources have changed."""
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
    """The library's operators, and the backend on CPU tensors by them. What is returned has to be kept."""
    from deberta_fast.op.backends import cuda, extension

    defined = torch.library.Library("deberta_fast_emulated", "DEF")
    for schema in extension.SCHEMAS:
        defined.define(schema)
    torch.ops.load_library(library)
    stand_in(cuda, torch.ops.deberta_fast_emulated)
    return defined


def stand_in(cuda, operators=None, patch=setattr) -> None:
    """Tensors of the CPU count as the GPU's; ``operators`` take the place of the extension's."""
    of_a_gpu = cuda.device_reasons
    patch(cuda, "MISSING", None)
    patch(cuda, "device_reasons", lambda device, size: [] if device.type == "cpu" else of_a_gpu(device, size))
    if operators is not None:
        for name in ("fused_forward", "fused_backward", "limit_near_bytes"):
            patch(cuda, name, getattr(operators, name).default)
