"""Builds the emulator of AMX (tests/emulator/amx.cpp) and loads it into this process."""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "emulator/amx.cpp"
KINDS = "ldtilecfg sttilecfg tilerelease tilezero tileloadd tileloaddt1 tilestored tdpbf16ps".split()


def processor_has(*features: str) -> bool:
    """Tells whether /proc/cpuinfo, if there is one, has these words."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and set(cpuinfo.read_text().split()).issuperset(features)


@functools.cache
def why_not() -> str | None:
    """Returns why instructions of AMX can be neither assembled nor emulated here, or None."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or shutil.which("g++") is None:
        return "needs g++ on x86-64 Linux"
    if not processor_has("avx2", "fma"):
        return "this processor has no FMA"
    trial = ["g++", "-x", "assembler", "-c", "-", "-o", os.devnull]
    done = subprocess.run(trial, input=b"tdpbf16ps %tmm0, %tmm1, %tmm2\n", capture_output=True)
    return None if done.returncode == 0 else "the assembler does not know AMX"


def build(folder: Path) -> Path:
    """Compiles the emulator into a library in the folder and returns its path."""
    library = folder / "libamx.so"
    flags = "-std=c++17 -O2 -fPIC -shared -Wall -Wextra -Werror".split()
    subprocess.run(["g++", *flags, SOURCE, "-o", library], check=True)
    return library


class Emulator:
    """The library in this process, whose threads may from now on execute instructions of AMX.

    A handler of SIGILL that is installed later, for example by faulthandler.enable(), takes its place. pytest enables
    faulthandler before it collects tests, so fixtures may load the library, but plugins should not.
    """

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.amx_emulator_install()
        self._library.amx_emulator_configured.restype = ctypes.c_bool

    def counts(self) -> dict[str, int]:
        """Returns how many instructions of each kind have been executed so far, by all threads."""
        numbers = (ctypes.c_uint64 * len(KINDS))()
        self._library.amx_emulator_counts(numbers)
        return dict(zip(KINDS, numbers))

    def configured(self) -> bool:
        """Tells whether the calling thread's tiles are configured."""
        return self._library.amx_emulator_configured()
