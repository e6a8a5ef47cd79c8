"""Builds ``deberta_fast._C``, the C++ of the CPU backend; everything else that packaging needs is in pyproject.toml.

csrc/*.cpp, the host code, is compiled once, on torch's stable ABI and Python's; every csrc/cpu/*.cpp once for each
instruction set, among which the extension chooses when it runs. Where it cannot be built, the package is installed
without it, and one line says why.

Environment: DEBERTA_FAST_CPU=0 leaves the extension out, 1 makes it an error that it cannot be built; CXX, CXXFLAGS,
LDFLAGS and MAX_JOBS as everywhere.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import setuptools
import setuptools.command.build_ext
import setuptools.errors

OLDEST_TORCH = (2, 11)
HOST = sorted(map(str, Path("csrc").glob("*.cpp")))
KERNELS = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
# Not -ffast-math: softmax meets infinities. No OpenMP: the threads are torch's.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi".split()
INSTRUCTION_SETS = {"plain": []}
if platform.machine() == "x86_64":
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c".split()
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c".split()
# As in ops.cpp. A Python without the GIL has no such ABI.
PYTHON_ABI = "" if sysconfig.get_config_var("Py_GIL_DISABLED") else "cp310"


class Unavailable(Exception):
    """The extension cannot be built, and why."""


class Command(NamedTuple):
    arguments: list[str]
    inputs: list[str]
    output: str


def words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def find_compiler() -> list[str]:
    """A command that compiles C++17 and links: it is tried."""
    compiler = words("CXX") or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not compiler:
        raise Unavailable("there is no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cpp")
        source.write_text("#include <string_view>\nstd::string_view trial = __FILE__;\n")
        trial = [
            *compiler,
            *FLAGS,
            *words("CXXFLAGS"),
            "-shared",
            "-o",
            f"{folder}/trial.so",
            source,
            *words("LDFLAGS"),
        ]
        try:
            run = subprocess.run(trial, stdout=sys.stderr)
        except OSError as error:
            raise Unavailable(f"the C++ compiler {shlex.join(compiler)} does not run: {error.strerror}") from None
    if run.returncode:
        raise Unavailable(f"the C++ compiler {shlex.join(compiler)} does not compile two lines of C++17")
    return compiler


def find_torch() -> Path:
    """The folder of torch, which is not imported: pip's isolation may hide what it imports in turn."""
    try:
        spec = find_spec("torch")
    except ImportError:
        spec = None
    # That isolation hides the environment's packages, but not where they are.
    hidden = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    spec = spec or PathFinder.find_spec("torch", hidden)
    if spec is None or spec.origin is None:
        raise Unavailable("no torch to build it with: install torch first, then this with --no-build-isolation")
    folder = Path(spec.origin).parent
    version = re.search(r"__version__ = '((\d+)\.(\d+).*)'", Path(folder, "version.py").read_text())
    if version is None or (int(version[2]), int(version[3])) < OLDEST_TORCH:
        found = version[1] if version else "of unknown version"
        raise Unavailable(f"torch is {found}, it needs {'.'.join(map(str, OLDEST_TORCH))} or newer")
    return folder


def plan() -> tuple[Path, list[Command]]:
    """A folder for all that the compiler writes, and the commands; the last one links."""
    if os.environ.get("DEBERTA_FAST_CPU") == "0":
        raise Unavailable("DEBERTA_FAST_CPU is 0")
    if sys.platform != "linux":
        raise Unavailable(f"it is for Linux, this is {sys.platform}")
    if not PYTHON_ABI:
        raise Unavailable("this Python has no stable ABI, being free-threaded")
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        raise Unavailable(f"the headers of Python are not installed: no Python.h in {python}")
    torch, compiler = find_torch(), find_compiler()

    compiling = [*compiler, *FLAGS, *words("CXXFLAGS")]
    hosting = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", f"{torch}/include", "-isystem", python]
    linking = [*words("LDFLAGS"), f"-L{torch}/lib", "-ltorch_cpu"]
    # Not setuptools' temporary folder: only what changed is compiled again, in editable installs too.
    key = hashlib.sha256(repr([platform.machine(), compiling, hosting, linking]).encode()).hexdigest()[:8]
    folder = Path("build", f"cpu-{key}")

    units = [(source, f"{folder}/{Path(source).stem}.o", hosting) for source in HOST]
    for name, flags in INSTRUCTION_SETS.items():
        flags = [f"-DDEBERTA_FAST_ISA={name}", *flags]
        units += [(source, f"{folder}/{Path(source).stem}.{name}.o", flags) for source in KERNELS]
    commands = []
    for source, output, flags in units:
        arguments = [*compiling, *flags, "-MD", "-MF", f"{output}.d", "-c", source, "-o", output]
        commands.append(Command(arguments, [source], output))
    objects = [output for _, output, _ in units]
    library = f"{folder}/_C.so"
    return folder, [*commands, Command([*compiler, "-shared", *objects, *linking, "-o", library], objects, library)]


def ninja_file(folder: Path, commands: list[Command]) -> str:
    lines = [f"builddir = {folder}"]
    lines += ["rule compile", "  command = $command", "  description = $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $command", "  description = $out"]
    for arguments, inputs, output in commands:
        lines.append(f"build {output}: {'compile' if '-c' in arguments else 'link'} {' '.join(inputs)}")
        lines.append(f"  command = {shlex.join(arguments).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def find_ninja() -> str | None:
    """Where it runs: under pip's isolation a script of that name would not find the package that it starts."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    ninja = shutil.which("ninja", path=path)
    return ninja if ninja and subprocess.run([ninja, "--version"], capture_output=True).returncode == 0 else None


def compile_library() -> Path:
    folder, commands = plan()
    folder.mkdir(parents=True, exist_ok=True)
    jobs, ninja = os.environ.get("MAX_JOBS"), find_ninja()
    runs = lambda arguments: subprocess.run(arguments).returncode == 0
    sys.stdout.flush()
    if ninja:
        Path(folder, "build.ninja").write_text(ninja_file(folder, commands))
        compiled = runs([ninja, "-f", f"{folder}/build.ninja", *(["-j", jobs] if jobs else [])])
    else:
        *compilations, link = [command.arguments for command in commands]
        with ThreadPoolExecutor(int(jobs or os.cpu_count())) as pool:
            compiled = all(pool.map(runs, compilations)) and runs(link)
            pool.shutdown(cancel_futures=True)
    if not compiled:
        raise Unavailable("csrc does not compile, the compiler's messages are above")
    return Path(commands[-1].output)


class build_ext(setuptools.command.build_ext.build_ext):
    """Puts the library where setuptools expects the extension, or takes away what an older build left there."""

    def run(self):
        target = Path(self.get_ext_fullpath(self.extensions[0].name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        try:
            shutil.copy(compile_library(), partial)
            partial.replace(target)
        except Unavailable as reason:
            target.unlink(missing_ok=True)
            if os.environ.get("DEBERTA_FAST_CPU") == "1":
                raise setuptools.errors.CompileError(f"cannot build deberta_fast._C: {reason}") from None
            print(f"deberta_fast: pure Python, without the extension deberta_fast._C: {reason}", file=sys.stderr)
            self.extensions = self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True
        finally:
            partial.unlink(missing_ok=True)


if __name__ == "__main__":
    extension = setuptools.Extension("deberta_fast._C", [*HOST, *KERNELS], depends=HEADERS, py_limited_api=True)
    options = {"bdist_wheel": {"py_limited_api": PYTHON_ABI}}
    setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": build_ext}, options=options)
