"""The CUDA kernels in the extension: when they are built, and how. A script stands in for nvcc."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from test_install import (  # noqa: F401
    ANSWER,
    DOES_NOT_RUN,
    NO_COMPILER,
    PURE,
    WITHOUT_NINJA,
    import_setup,
    objects,
    run,
    setup,
    small,
)

WITHOUT = "deberta_fast: without CUDA kernels: "
# It compiles C++ as C++, by the compiler that it is given, and leaves a record.
NVCC = """#!/bin/sh
echo "$@" >> {home}/calls
case $1 in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88"; exit ;;
  --dryrun) echo '#$ TOP={home}/bin/..' >&2; exit ;;
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 89 90 100; exit ;;
esac
for word; do
  shift
  case $word in
    -ccbin=*) compiler=${{word#*=}} ;;
    -Xcompiler=* | -Xfatbin=* | -gencode=* | --threads=*) ;;
    *) set -- "$@" "$word" ;;
  esac
done
exec "$compiler" -fPIC -x c++ "$@"
"""
CUDA_HOST = """
#ifndef USE_CUDA
#error without USE_CUDA
#endif
static_assert(sizeof(DEBERTA_FAST_ARCHITECTURES) > 8, "a string literal");
int launch(), plan();
extern "C" __attribute__((visibility("default"))) int launched() { return plan() + launch(); }
"""
PLAN = '#include "kernel.h"\nint plan() { return 10 * launched_here; }\n'
KERNEL = '#include "kernel.h"\nint launch() { return launched_here; }\n'
LAUNCH = f"{ANSWER}; import ctypes; print(getattr(ctypes.CDLL(_C.__file__), 'launched', lambda: None)())"


def write(path, text) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_toolkit(home, version="13.0", folder="lib64") -> Path:
    write(home / "bin/nvcc", NVCC.format(home=home, version=version))
    write(home / folder / "libcudart_static.a", "!<arch>\n")
    return home


def calls(home) -> list[str]:
    """Those that compile."""
    return [line for line in (home / "calls").read_text().splitlines() if " -c csrc" in line]


@pytest.fixture
def nowhere(setup, monkeypatch, tmp_path):  # noqa: F811
    """setup.py as a module, which finds no CUDA; tmp_path/path is on PATH, tmp_path/fallback looked for last."""
    for name in os.environ:
        if name.startswith(("CUDA_HOME", "DEBERTA_FAST_", "NVCC_", "TORCH_CUDA_ARCH_LIST")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}/path/bin:/nonexistent")
    monkeypatch.setattr(setup, "CUDA_FALLBACK", f"{tmp_path}/fallback/bin")
    return setup


def test_search_order(nowhere, monkeypatch, tmp_path):
    places = ["home", "path", "fallback"]
    for place in places:
        make_toolkit(tmp_path / place)
    monkeypatch.setenv("CUDA_HOME", f"{tmp_path}/home")
    for place in places:
        nvcc = tmp_path / place / "bin/nvcc"
        toolkit = nowhere.find_toolkit()
        assert (toolkit.nvcc, toolkit.libraries) == (str(nvcc), f"{tmp_path}/{place}/lib64")
        nvcc.unlink()
    with pytest.raises(nowhere.Unavailable, match=r"^there is no nvcc \(CUDA_HOME, PATH\)$"):
        nowhere.find_toolkit()


def of_the_wheels(path):
    return make_toolkit(path, folder="lib") / "lib"


def started_by_a_script(path):
    home = make_toolkit(path.with_name("elsewhere"))
    write(path / "bin/nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    return home / "lib64"


def told_by_nvcc(path):
    home = make_toolkit(path, folder="targets/some/lib")
    script = (home / "bin/nvcc").read_text()
    write(home / "bin/nvcc", script.replace("#$ TOP=", f'#$ LIBRARIES= "-L/none" "-L{home}/targets/some/lib" TOP='))
    return home / "targets/some/lib"


@pytest.mark.parametrize("layout", [of_the_wheels, started_by_a_script, told_by_nvcc])
def test_libraries(layout, nowhere, tmp_path):
    folder = layout(tmp_path / "path")
    assert nowhere.find_toolkit().libraries == str(folder)


def does_not_run(home, patch):
    write(home / "bin/nvcc", "#!/nonexistent\n")
    return "{home}/bin/nvcc does not run: No such file or directory"


def fails(home, patch):
    write(home / "bin/nvcc", "#!/bin/sh\nexit 1\n")
    return "{home}/bin/nvcc does not tell its version"


def too_old(home, patch):
    make_toolkit(home, version="11.8")
    return "{home}/bin/nvcc is 11.8, it needs 12.0 or newer"


def no_runtime(home, patch):
    (make_toolkit(home) / "lib64/libcudart_static.a").unlink()
    return "there is no libcudart_static.a in {home}/lib64"


def list_of(architectures, message):
    def reason(home, patch):
        patch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        return f"TORCH_CUDA_ARCH_LIST has {message}"

    reason.__name__ = architectures
    return reason


NUMBERS = "which is not like 9.0, 9.0a or 9.0+PTX"
REASONS = [
    does_not_run,
    fails,
    too_old,
    no_runtime,
    list_of("7.0;7.5+PTX", "nothing from 8.0 on, which the kernels need"),
    list_of("8.0 Hopper", f"Hopper, {NUMBERS}"),
    list_of("90", f"90, {NUMBERS}"),
    list_of("9.0+ptx", f"9.0+ptx, {NUMBERS}"),
]


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason, nowhere, monkeypatch, tmp_path, capsys):
    make_toolkit(tmp_path / "path")
    message = reason(tmp_path / "path", monkeypatch).format(home=tmp_path / "path")
    with pytest.raises(nowhere.Unavailable, match=f"^{re.escape(message)}$") as found:
        nowhere.find_toolkit()
    nowhere.without_cuda(found.value)
    assert capsys.readouterr() == ("", f"{WITHOUT}{message}\n")
    monkeypatch.setenv("DEBERTA_FAST_CUDA", "1")
    with pytest.raises(nowhere.Unavailable, match=f"^DEBERTA_FAST_CUDA is 1, but {re.escape(message)}$"):
        nowhere.without_cuda(found.value)


DEFAULT = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "compute_100"]  # the stand-in does not know 12.0
ARCHITECTURES = {
    "": DEFAULT,
    "8.0;9.0+PTX": ["sm_80", "sm_90", "compute_80"],
    "12.0 8.6;12.0+PTX 7.5": ["sm_120", "sm_86", "compute_120"],
    " 9.0a+PTX; 10.0f ": ["sm_90a", "sm_100f", "compute_90a"],
}


@pytest.mark.parametrize("listed", ARCHITECTURES)
def test_architectures(listed, nowhere, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    make_toolkit(tmp_path / "path")
    assert nowhere.find_toolkit().architectures == ARCHITECTURES[listed]


def test_binaries_are_made_from_the_oldest_ptx(nowhere):
    """A name that ends in a letter has its own. The oldest will do, since no kernel asks what it is made for."""
    made = {"sm_90": 86, "sm_86": 86, "sm_90a": "90a", "sm_120": 110, "sm_110": 110, "compute_110": 110}
    assert nowhere.generating(list(made)) == [f"-gencode=arch=compute_{n},code={name}" for name, n in made.items()]
    sources = [path for path in Path(nowhere.__file__).parent.glob("csrc/**/*") if path.is_file()]
    assert len(sources) > 20 and not any("__CUDA_ARCH" in path.read_text() for path in sources)


def test_folder(nowhere, monkeypatch):
    """Another one for whatever changes the objects."""
    host = nowhere.Host(["ccache", "g++", "-m64"], ["ccache", "g++", "-m64", "-O3"], [], [])
    toolkit = nowhere.Toolkit("nvcc", "13.0.88", ["sm_80", "compute_80"], "lib64")
    changes = [{}, {"nvcc": "other"}, {"version": "13.0.90"}, {"architectures": ["sm_80"]}, {"libraries": "lib"}]
    plans = [nowhere.plan_cuda(host, toolkit._replace(**change), ["ops.o"]) for change in changes]
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    plans.append(nowhere.plan_cuda(host, toolkit, ["ops.o"]))
    assert len({folder for folder, _ in plans}) == len(plans)


def test_launcher_of_the_compiler(nowhere, monkeypatch):
    host = nowhere.Host(["ccache", "g++", "-m64"], ["ccache", "g++", "-m64", "-O3"], [], [])
    monkeypatch.setattr(nowhere, "CUDA_KERNELS", ["csrc/cuda/kernel.cu"])
    _, commands = nowhere.plan_cuda(host, nowhere.Toolkit("nvcc", "13.0.88", [], "lib64"), ["ops.o"])
    (compilation,) = (arguments for arguments, _, output in commands if output.endswith("kernel.cuda.o"))
    assert compilation[0] == "nvcc" and "-ccbin=g++" in compilation and "-m64" not in compilation


@pytest.fixture
def project(small):  # noqa: F811
    """A project with little to compile, and a toolkit beside it."""
    write(small / "csrc/cuda/ops.cpp", CUDA_HOST)
    write(small / "csrc/cuda/kernel.cpp", PLAN)  # which may have the name of a kernel's file
    write(small / "csrc/cuda/kernel.cu", KERNEL)
    write(small / "csrc/cuda/kernel.h", "constexpr int launched_here = 7;\n")
    make_toolkit(small / "toolkit")
    return small


def build(project, *command, **options) -> str:
    """DEBERTA_FAST_CUDA is unset."""
    names = ("DEBERTA_FAST_CUDA", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "TORCH_CUDA_ARCH_LIST")
    variables = dict.fromkeys(names, "") | {"CUDA_HOME": str(project / "toolkit")}
    command = [sys.executable, *(command or ["setup.py"]), "build_ext", "--inplace"]
    return run(*command, cwd=project, **variables | options)


def works(project, launched=None):
    """Imports the extension, and launches its kernels if it has some."""
    output = run(sys.executable, "-c", LAUNCH, cwd=project)
    assert output == f"{project}/deberta_fast/_C.abi3.so 42\n{launched}\n"


@pytest.mark.parametrize("ninja", [True, False])
def test_build(project, ninja):
    if ninja and import_setup().find_ninja() is None:
        pytest.skip("no ninja")
    command = [] if ninja else ["-c", WITHOUT_NINJA]
    output = build(project, *command)
    assert WITHOUT not in output and PURE not in output
    works(project, launched=77)
    (call,) = calls(project / "toolkit")
    assert call.startswith("-std=c++17 -O3 ") and " -Xcompiler=-fPIC,-fvisibility=hidden " in call
    assert re.findall(r"-gencode=arch=compute_(?:80|100),code=(\S+)", call) == DEFAULT

    output = build(project, *command)
    assert output.count("ninja: no work to do") == 2 * ninja
    write(project / "csrc/cuda/kernel.h", "constexpr int launched_here = 8;\n")
    output = build(project, *command)
    assert not ninja or ("kernel.cuda.o" in output and "ops.o" not in output)  # what the header is in
    works(project, launched=88)

    # Leaving the kernels out and in again compiles nothing.
    before = len(calls(project / "toolkit"))
    output = build(project, *command, DEBERTA_FAST_CUDA="0")
    assert not ninja or "ninja: no work to do" in output
    works(project)
    if ninja:
        build(project, DEBERTA_FAST_CUDA="1")
        works(project, launched=88)
    assert len(calls(project / "toolkit")) == before


def test_without(project):
    """An nvcc that will not do, or is not to be used, leaves the CPU's extension."""
    assert WITHOUT not in build(project, DEBERTA_FAST_CUDA="0")
    assert not (project / "toolkit/calls").exists()
    works(project)

    make_toolkit(project / "toolkit", version="11.8")
    reason = f"{project}/toolkit/bin/nvcc is 11.8, it needs 12.0 or newer"
    assert re.findall(f"{WITHOUT}(.*)", build(project)) == [reason]
    works(project)
    output = build(project, fails=True, DEBERTA_FAST_CUDA="1")
    assert f"error: cannot build deberta_fast._C: DEBERTA_FAST_CUDA is 1, but {reason}" in output
    assert not list(project.glob("deberta_fast/_C*"))


@pytest.mark.parametrize("broken", ["cuda/kernel.cu", "cuda/ops.cpp"])
def test_broken(project, broken):
    write(project / "csrc" / broken, "#error broken on purpose\n")
    reason = "csrc/cuda does not compile, the compiler's messages are above"
    output = build(project)
    assert "broken on purpose" in output and re.findall(f"{WITHOUT}(.*)", output) == [reason]
    works(project)
    output = build(project, fails=True, DEBERTA_FAST_CUDA="1")
    assert f"error: cannot build deberta_fast._C: DEBERTA_FAST_CUDA is 1, but {reason}" in output
    assert not list(project.glob("deberta_fast/_C*"))


def test_without_the_rest(project):
    """There is no extension of CUDA kernels alone."""
    assert DOES_NOT_RUN in build(project, fails=True, DEBERTA_FAST_CUDA="1", **NO_COMPILER)
    output = build(project, fails=True, DEBERTA_FAST_CUDA="1", DEBERTA_FAST_CPU="0")
    assert "DEBERTA_FAST_CPU is 0 but DEBERTA_FAST_CUDA is 1: one extension has both" in output
    output = build(project, DEBERTA_FAST_CPU="0")
    assert PURE in output and WITHOUT not in output
    assert not (project / "toolkit/calls").exists()


def test_nvcc(project, setup, monkeypatch):  # noqa: F811
    """The real one. What it builds is imported whether or not there is a GPU, and shows nothing of CUDA's."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    try:
        setup.find_toolkit()
    except setup.Unavailable as reason:
        pytest.skip(str(reason))
    launch = "int launch() { kernel<<<1, 1>>>(); return cudaGetLastError(), 7; }\n"
    write(project / "csrc/cuda/kernel.cu", "__global__ void kernel() {}\n" + launch)
    build(project, CUDA_HOME=os.environ.get("CUDA_HOME", ""), DEBERTA_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0+PTX")
    works(project, launched=77)
    if shutil.which("nm"):
        symbols = run("nm", "-D", "--defined-only", project / "deberta_fast/_C.abi3.so", cwd=project)
        assert "launched" in symbols and "cuda" not in symbols
