"""Builds ``deberta_fast._C``, the C++ and CUDA code of the compiled backends. pyproject.toml holds all other packaging.

The host code of csrc/cpu (HOST below) is compiled once, against the stable ABIs of torch and Python. The other files of
csrc/cpu are compiled once per instruction set, and the extension selects one at run time. Those of csrc/cpu/tiles are
left out, with a line that says why, for instruction sets that the compiler does not know. If nvcc is installed, with or
without a GPU, csrc/cuda becomes part of the same extension, which loads on machines without CUDA too. If the CUDA
kernels or the whole extension cannot be built, they are left out and one line says why.

Environment variables: DEBERTA_FAST_CPU=0 leaves the extension out, and 1 makes a failure to build it an error.
DEBERTA_FAST_CUDA does the same for the CUDA kernels. CUDA_HOME is searched for nvcc before PATH and /usr/local/cuda.
TORCH_CUDA_ARCH_LIST defaults to those of "8.0 8.6 8.9 9.0 10.0 12.0+PTX" that nvcc knows; entries below 8.0 are left
out. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS have their usual meaning.
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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import setuptools
import setuptools.command.build_ext
import setuptools.errors

OLDEST_TORCH = (2, 11)
OLDEST_CUDA = (12, 0)
CPU = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
HOST = [path for path in CPU if Path(path).stem in ("ops", "processor", "schedule")]
KERNELS = [path for path in CPU if path not in HOST]
TILES = sorted(map(str, Path("csrc/cpu/tiles").glob("*.cpp")))  # attention in bfloat16
TILES += [path for path in KERNELS if Path(path).stem == "sums"]
CUDA_HOST = sorted(map(str, Path("csrc/cuda").glob("*.cpp")))
CUDA_KERNELS = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
# No -ffast-math, because softmax handles infinities; no OpenMP, because torch owns the threads.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi".split()
INSTRUCTION_SETS = {"plain": []}
TILE_SETS = {}  # with TILES; left out if the compiler does not know them
if platform.machine() == "x86_64":
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c".split()
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c".split()
    TILE_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
    TILE_SETS["amx"] = [*TILE_SETS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
# Compression makes the library a quarter as large.
CUDA_FLAGS = "-std=c++17 -O3 --threads=2 -Xfatbin=-compress-all -Xcompiler=-fPIC,-fvisibility=hidden".split()
# Static, so that the extension loads on machines without CUDA.
CUDA_LIBRARIES = "-lcudart_static -lpthread -ldl -lrt -Wl,--exclude-libs,ALL".split()
CUDA_FALLBACK = "/usr/local/cuda/bin"
# The newest of these that nvcc knows is built as PTX too, which newer GPUs compile when they load it.
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
# The same as in ops.cpp. A Python without the GIL has no stable ABI.
PYTHON_ABI = "" if sysconfig.get_config_var("Py_GIL_DISABLED") else "cp310"


class Unavailable(Exception):
    """The reason why the extension, or the CUDA kernels in it, cannot be built."""


class Host(NamedTuple):
    """The C++ compiler, its command for all sources, flags added for sources that include torch, linker flags, and the
    keys of TILE_SETS that it knows."""

    compiler: list[str]
    compiling: list[str]
    hosting: list[str]
    linking: list[str]
    tiles: tuple[str, ...] = ()


class Toolkit(NamedTuple):
    nvcc: str
    version: str
    architectures: list[str]
    libraries: str


class Command(NamedTuple):
    arguments: list[str]
    inputs: list[str]
    output: str


def words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def find_compiler() -> list[str]:
    """Returns a command that compiles and links C++17, after a trial."""
    compiler = words("CXX") or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not compiler:
        raise Unavailable("there is no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cpp")
        source.write_text("#include <string_view>\nstd::string_view trial = __FILE__;\n")
        flags = [*FLAGS, *words("CXXFLAGS"), "-shared", "-o", f"{folder}/trial.so"]
        try:
            run = subprocess.run([*compiler, *flags, source, *words("LDFLAGS")], stdout=sys.stderr)
        except OSError as error:
            raise Unavailable(f"the C++ compiler {shlex.join(compiler)} does not run: {error.strerror}") from None
    if run.returncode:
        raise Unavailable(f"the C++ compiler {shlex.join(compiler)} does not compile two lines of C++17")
    return compiler


def find_tiles(compiler: list[str]) -> list[str]:
    """Returns the keys of TILE_SETS whose instructions the compiler and its assembler know, after a trial."""
    known = []
    for name, flags in TILE_SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "trial.cpp")
            tile = 'asm volatile("tilezero %tmm0");' if name == "amx" else ""
            source.write_text(
                "#include <immintrin.h>\n"
                f"__m512 f(__m512 x, __m512bh y) {{ {tile} return _mm512_dpbf16_ps(x, y, y); }}\n"
            )
            trial = [*compiler, *FLAGS, *words("CXXFLAGS"), *flags, "-c", source, "-o", f"{folder}/trial.o"]
            run = subprocess.run(trial, capture_output=True, text=True)
        if run.returncode == 0:
            known.append(name)
        else:
            print(f"deberta_fast: without bfloat16 kernels for {name}: {run.stderr.strip()}", file=sys.stderr)
    return known


def find_torch() -> Path:
    """Returns the folder of torch without importing it, because pip's isolation may hide packages that it needs."""
    try:
        spec = find_spec("torch")
    except ImportError:
        spec = None
    # The isolation hides the environment's packages, but sysconfig still knows their folders.
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


def find_host() -> Host:
    if os.environ.get("DEBERTA_FAST_CPU") == "0":
        contradiction = " but DEBERTA_FAST_CUDA is 1: one extension has both"
        raise Unavailable(f"DEBERTA_FAST_CPU is 0{contradiction if os.environ.get('DEBERTA_FAST_CUDA') == '1' else ''}")
    if sys.platform != "linux":
        raise Unavailable(f"it is for Linux, this is {sys.platform}")
    if not PYTHON_ABI:
        raise Unavailable("this Python has no stable ABI, being free-threaded")
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        raise Unavailable(f"the headers of Python are not installed: no Python.h in {python}")
    torch, compiler = find_torch(), find_compiler()
    tiles = find_tiles(compiler)
    including = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", f"{torch}/include", "-isystem", python]
    return Host(
        compiler,
        [*compiler, *FLAGS, *words("CXXFLAGS")],
        [*including, *(f"-DDEBERTA_FAST_{name.upper()}" for name in tiles)],
        [*words("LDFLAGS"), f"-L{torch}/lib", "-ltorch_cpu"],
        tuple(tiles),
    )


def find_architectures(nvcc: str) -> list[str]:
    """Returns the targets under nvcc's names: "sm_80" is a binary, "compute_80" is PTX."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        listed = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]
        listed += [f"{name}+PTX" for name in listed[-1:]]
    numbers = {}  # whether PTX is built, by architecture
    for name in listed:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST has {name}, which is not like 9.0, 9.0a or 9.0+PTX")
        if int(match[1]) < 8:
            continue  # torch's list may name older GPUs too.
        number = match[1] + match[2]
        numbers[number] = numbers.get(number, False) or match[3] is not None
    if not numbers:
        raise Unavailable("TORCH_CUDA_ARCH_LIST has nothing from 8.0 on, which the kernels need")
    sources = (source_of(number, numbers) for number, ptx in numbers.items() if ptx)
    return [f"sm_{number}" for number in numbers] + [f"compute_{number}" for number in dict.fromkeys(sources)]


def source_of(number: str, numbers: Iterable[str]) -> str:
    """Returns the architecture from whose PTX a binary is made: the oldest of its generation.

    PTX takes longer to make than a binary, and no kernel depends on its architecture: nvcc makes the same PTX for 8.0
    to 9.0, and the same from 10.0 on. An architecture that ends in a letter has PTX that others cannot use.
    """
    if not number.isdecimal():
        return number
    generation = lambda other: int(other) >= 100
    return min((n for n in numbers if n.isdecimal() and generation(n) == generation(number)), key=int)


def generating(architectures: list[str]) -> list[str]:
    """Returns nvcc's flags for the result of find_architectures."""
    numbers = {name: name.partition("_")[2] for name in architectures}
    return [f"-gencode=arch=compute_{source_of(n, numbers.values())},code={name}" for name, n in numbers.items()]


def find_toolkit() -> Toolkit:
    """Finds CUDA's compiler and libraries; no GPU is needed."""
    places = [os.environ.get("PATH", os.defpath), CUDA_FALLBACK]
    if os.environ.get("CUDA_HOME"):
        places.insert(0, f"{os.environ['CUDA_HOME']}/bin")
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise Unavailable("there is no nvcc (CUDA_HOME, PATH)")
    output = {"capture_output": True, "text": True}
    try:
        version = re.search(r"release (\d+)\.(\d+), V([\d.]+)", subprocess.run([nvcc, "--version"], **output).stdout)
    except OSError as error:
        raise Unavailable(f"{nvcc} does not run: {error.strerror}") from None
    if version is None:
        raise Unavailable(f"{nvcc} does not tell its version")
    if (int(version[1]), int(version[2])) < OLDEST_CUDA:
        raise Unavailable(f"{nvcc} is {version[1]}.{version[2]}, it needs {'.'.join(map(str, OLDEST_CUDA))} or newer")
    # nvcc may be a script that starts another nvcc. A dry run prints that one's folder and the folders of libraries.
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], **output).stderr
    root = re.search(r"^#\$ TOP=(.*)", told, re.MULTILINE)
    root = os.path.realpath(root[1] if root else Path(nvcc).resolve().parent.parent)
    folders = [f"{root}/lib64", f"{root}/lib", *re.findall(r'"-L([^"]*)"', told)]
    libraries = [folder for folder in folders if Path(folder, "libcudart_static.a").exists()]
    if not libraries:
        raise Unavailable(f"there is no libcudart_static.a in {folders[0]}")
    return Toolkit(nvcc, version[3], find_architectures(nvcc), libraries[0])


def build_folder(kind: str, *key) -> Path:
    """Returns a permanent folder, unlike setuptools' temporary one, so that editable installs compile only changes."""
    return Path("build", f"{kind}-{hashlib.sha256(repr([*key]).encode()).hexdigest()[:8]}")


def compilation(compiling: list[str], source: str, output: str) -> Command:
    return Command([*compiling, "-MD", "-MF", f"{output}.d", "-c", source, "-o", output], [source], output)


def link(host: Host, objects: list[str], flags: list[str], library: str) -> Command:
    return Command([*host.compiler, "-shared", *objects, *flags, "-o", library], objects, library)


def plan(host: Host) -> tuple[Path, list[Command]]:
    """Returns the folder of the compiler's output, and the commands, of which the last one links."""
    folder = build_folder("cpu", platform.machine(), *host[1:])
    hosting = [*host.compiling, *host.hosting]
    commands = [compilation(hosting, source, f"{folder}/{Path(source).stem}.o") for source in HOST]
    sets = [(name, flags, KERNELS) for name, flags in INSTRUCTION_SETS.items()]
    for name, flags, sources in [*sets, *((name, TILE_SETS[name], TILES) for name in host.tiles)]:
        compiling = [*host.compiling, f"-DDEBERTA_FAST_ISA={name}", *flags]
        commands += [compilation(compiling, source, f"{folder}/{Path(source).stem}.{name}.o") for source in sources]
    objects = [command.output for command in commands]
    return folder, [*commands, link(host, objects, host.linking, f"{folder}/_C.so")]


def plan_cuda(host: Host, toolkit: Toolkit, objects: list[str]) -> tuple[Path, list[Command]]:
    """Returns the same for the extension with CUDA kernels; ``objects`` are those of csrc/cpu."""
    # nvcc accepts only the compiler's name, without launchers and flags.
    compiler = next(word for word in host.compiler if Path(word).name not in ("ccache", "distcc", "sccache"))
    nvcc = [toolkit.nvcc, *CUDA_FLAGS, f"-ccbin={compiler}", *generating(toolkit.architectures)]
    told = f'-DDEBERTA_FAST_ARCHITECTURES="{" ".join(toolkit.architectures)}"'
    hosting = [*host.compiling, *host.hosting, "-DUSE_CUDA", told]
    linking = [*host.linking, f"-L{toolkit.libraries}", *CUDA_LIBRARIES]
    implicit = [os.environ.get(f"NVCC_{name}_FLAGS") for name in ("PREPEND", "APPEND")]
    folder = build_folder("cuda", objects, nvcc, toolkit.version, implicit, hosting, linking)
    commands = [compilation(hosting, source, f"{folder}/{Path(source).stem}.o") for source in CUDA_HOST]
    commands += [compilation(nvcc, source, f"{folder}/{Path(source).stem}.cuda.o") for source in CUDA_KERNELS]
    objects = [*objects, *(command.output for command in commands)]
    return folder, [*commands, link(host, objects, linking, f"{folder}/_C.so")]


def ninja_file(folder: Path, commands: list[Command]) -> str:
    lines = [f"builddir = {folder}"]
    lines += ["rule compile", "  command = $command", "  description = $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $command", "  description = $out"]
    for arguments, inputs, output in commands:
        lines.append(f"build {output}: {'compile' if '-c' in arguments else 'link'} {' '.join(inputs)}")
        lines.append(f"  command = {shlex.join(arguments).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def find_ninja() -> str | None:
    """Returns a ninja that runs. Under pip's isolation, a ninja script may not find the package that it starts."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    ninja = shutil.which("ninja", path=path)
    return ninja if ninja and subprocess.run([ninja, "--version"], capture_output=True).returncode == 0 else None


def compile_library(sources: str, folder: Path, commands: list[Command]) -> Path:
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
        raise Unavailable(f"{sources} does not compile, the compiler's messages are above")
    return Path(commands[-1].output)


def without_cuda(reason: Unavailable) -> None:
    if os.environ.get("DEBERTA_FAST_CUDA") == "1":
        raise Unavailable(f"DEBERTA_FAST_CUDA is 1, but {reason}") from None
    print(f"deberta_fast: without CUDA kernels: {reason}", file=sys.stderr)


def build_library() -> Path:
    """Builds the CPU's library first, so that a later failure concerns only the CUDA kernels."""
    host, toolkit = find_host(), None
    if os.environ.get("DEBERTA_FAST_CUDA") != "0":
        try:
            toolkit = find_toolkit()
        except Unavailable as reason:
            without_cuda(reason)
    folder, commands = plan(host)
    library = compile_library("csrc", folder, commands)
    if toolkit:
        try:
            library = compile_library("csrc/cuda", *plan_cuda(host, toolkit, commands[-1].inputs))
        except Unavailable as reason:
            without_cuda(reason)
    return library


class build_ext(setuptools.command.build_ext.build_ext):
    """Copies the library to where setuptools expects the extension, or removes the result of an older build there."""

    def run(self):
        target = Path(self.get_ext_fullpath(self.extensions[0].name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        try:
            shutil.copy(build_library(), partial)
            partial.replace(target)
        except Unavailable as reason:
            target.unlink(missing_ok=True)
            if "1" in (os.environ.get("DEBERTA_FAST_CPU"), os.environ.get("DEBERTA_FAST_CUDA")):
                raise setuptools.errors.CompileError(f"cannot build deberta_fast._C: {reason}") from None
            print(f"deberta_fast: pure Python, without the extension deberta_fast._C: {reason}", file=sys.stderr)
            self.extensions = self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True
        finally:
            partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sources = list(dict.fromkeys([*HOST, *KERNELS, *TILES, *CUDA_HOST, *CUDA_KERNELS]))
    extension = setuptools.Extension("deberta_fast._C", sources, depends=HEADERS, py_limited_api=True)
    options = {"bdist_wheel": {"py_limited_api": PYTHON_ABI}}
    setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": build_ext}, options=options)
