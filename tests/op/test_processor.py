"""csrc/cpu/processor.h tells about the processor what /proc/cpuinfo tells."""

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import amx
import pytest

SOURCE = Path(__file__).parents[2] / "csrc/cpu/processor.cpp"


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="needs g++ on x86-64 Linux",
)
def test_features(tmp_path):
    library = tmp_path / "processor.so"
    subprocess.run(
        ["g++", *"-std=c++17 -O2 -fPIC -shared -Wall -Wextra -Werror".split(), SOURCE, "-o", library], check=True
    )
    functions = ctypes.CDLL(str(library))

    def tells(name):
        function = functions[f"_ZN12deberta_fast{len(name)}{name}Ev"]
        function.restype = ctypes.c_bool
        return function()

    assert tells("has_avx512_bf16") == amx.processor_has("avx512_bf16")
    permitted = ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0  # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    assert tells("has_amx") == (amx.processor_has("amx_tile", "amx_bf16") and permitted)
