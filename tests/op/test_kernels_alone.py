"""The C++ kernels without torch (kernels_alone.cpp): under sanitizers, by other compilers, on another processor."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted(path for path in (ROOT / "csrc/cpu").glob("*.cpp") if path.name != "ops.cpp")
CHECK = ROOT / "tests/op/kernels_alone.cpp"
SOURCES = [*KERNELS, CHECK]
TILES = [*(ROOT / "csrc/cpu/tiles").glob("*.cpp"), ROOT / "csrc/cpu/schedule.cpp", ROOT / "csrc/cpu/sums.cpp", CHECK]
FLAGS = "-std=c++17 -O1 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -Wno-psabi -pthread".split()
SANITIZERS = "-g -fsanitize=address,undefined -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS".split()
AVX2 = "-mavx2 -mfma -mf16c".split()
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq".split()]


def processor_has(*features) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return platform.machine() == "x86_64" and words.issuperset(features)


def compile_and_run(folder, compiler, *flags, sources=SOURCES, under=()):
    if not all(map(shutil.which, [compiler, *under])):
        pytest.skip(f"{compiler} or {' '.join(under)} is not installed")
    program = folder / "kernels_alone"
    subprocess.run([compiler, *FLAGS, *flags, *sources, "-o", program], check=True, timeout=300)
    done = subprocess.run([*under, program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("\nok\n"), done.stdout


SETS = {  # flags of the compiler, and features of the processor
    "plain": ([], []),
    "avx2": (AVX2, ["avx2", "fma", "f16c"]),
    "avx512": (AVX512, ["avx512bw", "avx512dq", "avx512vl"]),
}


@pytest.mark.parametrize("name", SETS)
def test_sanitized(tmp_path, name):
    flags, features = SETS[name]
    if features and not processor_has(*features):
        pytest.skip(f"this processor has no {name}")
    compile_and_run(tmp_path, "g++", *SANITIZERS, *flags, f"-DDEBERTA_FAST_ISA={name}")


TILE_SETS = {  # the namespace, flags of the compiler, and features of the processor
    "plain": ("amx", AVX2, ["avx2", "fma", "f16c"]),
    "avx512_bf16": ("avx512_bf16", [*AVX512, "-mavx512bf16"], ["avx512bw", "avx512dq", "avx512vl", "avx512_bf16"]),
}


@pytest.mark.parametrize("name", TILE_SETS)
def test_tiles_sanitized(tmp_path, name):
    """Plain C++ multiplies the tiles if no flags for AMX or AVX512_BF16 are given."""
    namespace, flags, features = TILE_SETS[name]
    if not processor_has(*features):
        pytest.skip(f"this processor has no {name}")
    flags = [*SANITIZERS, *flags, f"-DDEBERTA_FAST_ISA={namespace}", "-DDEBERTA_FAST_TILES"]
    compile_and_run(tmp_path, "g++", *flags, sources=TILES)


def test_clang(tmp_path):
    compile_and_run(tmp_path, "clang++", "-DDEBERTA_FAST_ISA=plain")


def test_aarch64(tmp_path):
    """The program runs on an emulated processor."""
    compile_and_run(tmp_path, "aarch64-linux-gnu-g++", "-static", "-DDEBERTA_FAST_ISA=plain", under=["qemu-aarch64"])
