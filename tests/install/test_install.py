"""Builds and installs a wheel, an sdist, and pure Python if the extension cannot be built. Needs no network."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDERS = ("bench", "csrc", "deberta_fast", "docs", "examples", "tests")
FILES = {
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
}
PURE = "deberta_fast: pure Python, without the extension deberta_fast._C: "
NO_COMPILER = {"CXX": "/nonexistent"}
DOES_NOT_RUN = "the C++ compiler /nonexistent does not run: No such file or directory"


def run(*command, cwd, fails=False, **variables) -> str:
    """Runs a command and returns its output. The command must succeed, or fail if ``fails``.

    It does not inherit DEBERTA_FAST_CPU from make, and builds no CUDA kernels, which take minutes, unless told to.
    """
    outside = {name: value for name, value in os.environ.items() if name not in ("DEBERTA_FAST_CPU", "PYTHONPATH")}
    own = {"DEBERTA_FAST_CUDA": "0", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment = outside | own | variables
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, timeout=300, **output)
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def pip(*arguments, **options) -> str:
    return run(sys.executable, "-m", "pip", *arguments, "--no-build-isolation", "--no-deps", "-v", ".", **options)


def build_in_place(cwd, **options) -> str:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=cwd, **options)


def import_setup():
    spec = importlib.util.spec_from_file_location("deberta_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup():
    """setup.py as a module."""
    return import_setup()


@pytest.fixture(scope="module")
def objects():
    """The folder for what the compiler writes, relative to any checkout."""
    setup = import_setup()
    try:
        return setup.plan(setup.find_host())[0]
    except setup.Unavailable as reason:
        if os.environ.get("DEBERTA_FAST_CPU") == "1":
            raise
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def checkout(objects, tmp_path_factory):
    """A copy of this one, with an extension built in place, and in dist/ the wheel."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy2(ROOT / name, tree)
    if (ROOT / objects).exists():
        shutil.copytree(ROOT / objects, tree / objects)  # not to compile all of it again
    build_in_place(tree, DEBERTA_FAST_CPU="1")
    pip("wheel", "-w", "dist", cwd=tree, DEBERTA_FAST_CPU="1")
    return tree


@pytest.fixture(scope="module")
def wheel(checkout):
    (path,) = checkout.glob("dist/*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(checkout):
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=checkout, **NO_COMPILER)
    (path,) = checkout.glob("dist/*.tar.gz")
    return path


def files(tree, *folders) -> set[str]:
    paths = [path for folder in folders for path in Path(tree, folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(tree)) for path in paths if path.suffix not in (".pyc", ".so")}


def use(folder, code) -> str:
    """Runs it with the package in that folder, and with a query q."""
    begin = f"""
import sys
# The finder of an editable install would complete the package: it finds each of its modules by itself.
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import torch, deberta_fast
assert deberta_fast.__file__.startswith({str(folder)!r}), deberta_fast.__file__
q = torch.randn(1, 2, 40, 16)
"""
    return run(sys.executable, "-W", "ignore", "-c", begin + code, cwd=folder)


def test_wheel(wheel, checkout, tmp_path):
    assert re.fullmatch(r"deberta_fast-[\d.]+-cp310-abi3-linux_\w+", wheel.stem)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert {name for name in archive.namelist() if ".dist-info/" not in name} == {
        "deberta_fast/_C.abi3.so",
        *files(checkout, "deberta_fast"),
    }
    use(tmp_path, "deberta_fast.disentangled_attention(q, q, q, backend='cpu')")


def test_sdist(sdist, checkout):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("deberta_fast.egg-info/")}
    assert names - made == FILES | files(checkout, *FOLDERS)


def test_wheel_of_sdist(sdist, wheel, checkout, objects, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    shutil.copytree(checkout / objects, tree / objects)
    pip("wheel", "-w", "dist", cwd=tree, DEBERTA_FAST_CPU="1")
    with zipfile.ZipFile(tree / "dist" / wheel.name) as again, zipfile.ZipFile(wheel) as before:
        assert sorted(again.namelist()) == sorted(before.namelist())


def test_without_compiler(checkout, wheel, tmp_path):
    # Earlier builds left an extension in the package, and one in the folder that becomes a wheel.
    in_place = checkout / "deberta_fast/_C.abi3.so"
    assert in_place.exists() and list(checkout.glob("build/lib*/deberta_fast/_C.abi3.so"))
    output = pip("install", "--target", tmp_path, cwd=checkout, **NO_COMPILER)
    assert re.findall(f"{PURE}(.*)", output) == [DOES_NOT_RUN]
    assert "-py3-none-any.whl" in output  # which pip shows without -v
    assert in_place.exists() and not list(tmp_path.rglob("*.so"))
    call = "deberta_fast.disentangled_attention(q, q, q, backend={!r})"
    use(tmp_path, f"torch.testing.assert_close({call.format('eager')}, {call.format(None)})")
    assert "deberta_fast._C" in use(tmp_path, f"try: {call.format('cpu')}\nexcept RuntimeError as e: print(e)")


def test_required(checkout, tmp_path):
    output = pip("wheel", "-w", tmp_path, cwd=checkout, fails=True, DEBERTA_FAST_CPU="1", **NO_COMPILER)
    assert f"error: cannot build deberta_fast._C: {DOES_NOT_RUN}" in output
    assert not list(tmp_path.iterdir())


# A function that two instruction sets have in common, of the same name, would be linked in once: in AVX-512, say, for
# every CPU.
def in_common(folder) -> list[str]:
    found = []
    for path in folder.glob("*.avx*.o"):
        name = path.name.split(".")[-2]
        symbols = run("nm", "--defined-only", path, cwd=folder).splitlines()
        found += [line for line in symbols if line.split()[-2] == "W" and f"{len(name)}{name}" not in line]
    return found


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("nm"), reason="needs x86-64, nm")


@needs_x86
def test_nothing_in_common(checkout, objects):
    assert list((checkout / objects).glob("*.avx*.o"))
    assert not in_common(checkout / objects)


HOST = """
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
namespace plain { int kernel(int); }
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C(void) {
  PyObject* self = PyModule_Create(&module);
  PyModule_AddIntConstant(self, "answer", plain::kernel(6));
  return self;
}
"""
KERNEL = '#include "shared.h"\nnamespace DEBERTA_FAST_ISA { int kernel(int x) { return shared(x) * 7; } }\n'
SHARED = "#pragma once\ninline __attribute__((noinline)) int shared(int x) { return x; }\n"


@pytest.fixture
def small(objects, tmp_path):
    """A project with little to compile."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    texts = {"cpu/ops.cpp": HOST, "cpu/first.cpp": KERNEL, "cpu/shared.h": SHARED}
    for name, text in (
        {f"csrc/{name}": text for name, text in texts.items()} | {"deberta_fast/__init__.py": ""}
    ).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


ANSWER = "import torch; from deberta_fast import _C; print(_C.__file__, _C.answer)"
WITHOUT_NINJA = """
import runpy, shutil, sys
which = shutil.which
shutil.which = lambda name, **options: None if name == "ninja" else which(name, **options)
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("ninja", [True, False])
def test_build(small, ninja):
    if ninja and import_setup().find_ninja() is None:
        pytest.skip("no ninja")
    command = [sys.executable, *(["setup.py"] if ninja else ["-c", WITHOUT_NINJA]), "build_ext", "--inplace"]
    extension = small / "deberta_fast/_C.abi3.so"
    outputs = [run(*command, cwd=small)]
    assert run(sys.executable, "-c", ANSWER, cwd=small) == f"{extension} 42\n"
    outputs.append(run(*command, cwd=small))
    assert ["ninja: no work to do" in output for output in outputs] == [False, ninja]

    header = small / "csrc/cpu/shared.h"
    header.write_text(SHARED.replace("return x", "return x + 1"))
    output = run(*command, cwd=small)
    assert not ninja or ("first.plain.o" in output and "ops.o" not in output)  # what the header is in
    assert run(sys.executable, "-c", ANSWER, cwd=small) == f"{extension} 49\n"

    header.write_text("#error broken on purpose\n")
    for flag, fails in (("1", True), ("", False)):
        output = run(*command, cwd=small, fails=fails, DEBERTA_FAST_CPU=flag)
        assert "broken on purpose" in output and "csrc does not compile" in output
        assert (PURE in output) != fails
        assert [path.name for path in extension.parent.iterdir()] == ["__init__.py"]


@needs_x86
def test_in_common_is_found(small, objects):
    build_in_place(small)
    assert any("shared" in line for line in in_common(small / objects))


WITHOUT_AMX = """#!/bin/sh
for argument; do test "$argument" != -mamx-tile || { echo "unrecognized option $argument" >&2; exit 1; }; done
exec c++ "$@"
"""


@needs_x86
def test_compiler_without_amx(small):
    """The kernels for AMX are left out, with the compiler's reason."""
    (small / "csrc/cpu/tiles").mkdir()
    (small / "csrc/cpu/tiles/second.cpp").write_text("namespace DEBERTA_FAST_ISA { int tiles() { return 0; } }\n")
    compiler = small / "old-compiler"
    compiler.write_text(WITHOUT_AMX)
    compiler.chmod(0o755)
    output = build_in_place(small, CXX=str(compiler))
    assert output.count("without bfloat16 kernels for") == 1
    assert "without bfloat16 kernels for amx: unrecognized option -mamx-tile" in output
    assert [path.name for path in small.glob("build/cpu-*/second.*.o")] == ["second.avx512_bf16.o"]


def test_left_out(small):
    build_in_place(small)
    output = build_in_place(small, DEBERTA_FAST_CPU="0")
    assert output.count(PURE) == 1 and "DEBERTA_FAST_CPU is 0" in output
    assert not list(small.glob("deberta_fast/*.so"))


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(small, mode):
    hook = f"build_meta.build_editable('dist', {{'editable_mode': {mode!r}}})"
    for variables, extensions in (({}, ["_C.abi3.so"]), (NO_COMPILER, [])):
        output = run(sys.executable, "-c", f"from setuptools import build_meta; {hook}", cwd=small, **variables)
        assert output.count(PURE) == (not extensions)
        assert [path.name for path in small.glob("deberta_fast/_C*")] == extensions
        linked = [path.name for path in small.glob("build/__editable__*/deberta_fast/_C*")]
        assert mode == "lenient" or linked == extensions


def test_flags_of_the_environment(small):
    """Flags of the environment, such as sanitizers', come last. An ordinary build does not reuse their objects."""
    assert "answer" not in build_in_place(
        small, CXXFLAGS="-O1 -DDEBERTA_FAST_TRIAL='a b'", LDFLAGS="-Wl,-O1", MAX_JOBS="1"
    )
    build_in_place(small)
    assert len(list(small.glob("build/cpu-*"))) == 2


def no_stable_abi(setup, patch, tmp_path):
    patch.setattr(setup, "PYTHON_ABI", "")
    return "this Python has no stable ABI"


def other_system(setup, patch, tmp_path):
    patch.setattr(sys, "platform", "darwin")
    return "it is for Linux, this is darwin"


def no_headers(setup, patch, tmp_path):
    patch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return f"the headers of Python are not installed: no Python.h in {tmp_path}"


def no_torch(setup, patch, tmp_path):
    def find_spec(name):
        raise ModuleNotFoundError(name)

    patch.setattr(setup, "find_spec", find_spec)
    patch.setattr(setup.PathFinder, "find_spec", lambda name, path: None)
    return "no torch to build it with"


def old_torch(setup, patch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.10.1+cpu'\n")
    patch.setattr(setup, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    return "torch is 2.10.1+cpu, it needs 2.11 or newer"


def no_compiler(setup, patch, tmp_path):
    patch.delenv("CXX", raising=False)
    patch.setenv("PATH", str(tmp_path))
    return "there is no C++ compiler"


def broken_compiler(setup, patch, tmp_path):
    patch.setenv("CXX", "false")
    return "the C++ compiler false does not compile two lines of C++17"


@pytest.mark.parametrize(
    "reason", [no_stable_abi, other_system, no_headers, no_torch, old_torch, no_compiler, broken_compiler]
)
def test_reasons(reason, objects, setup, monkeypatch, tmp_path):
    message = reason(setup, monkeypatch, tmp_path)
    with pytest.raises(setup.Unavailable, match=re.escape(message)):
        setup.find_host()


def test_torch_behind_isolation(setup, monkeypatch):
    """setup.py finds torch if pip hides the environment's packages, because sysconfig still names their folder."""
    folder = Path(torch.__file__).parent
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder.parent))
    assert setup.find_torch() == folder
