"""The emulator of AMX (tests/emulator/amx.cpp) against NumPy, instruction by instruction.

On a processor with AMX, the same tests compare the processor with NumPy, except for what only the emulator can tell.
"""

import ctypes
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from threading import Barrier

import amx
import amx_functions
import numpy as np
import pytest
from amx_functions import ABSOLUTE, CONSTANT, ILLEGAL, addresses, configuration

pytestmark = pytest.mark.skipif(amx.why_not() is not None, reason=str(amx.why_not()))
NATIVE = amx.processor_has("amx_tile", "amx_bf16")
emulated = pytest.mark.skipif(NATIVE, reason="this processor has AMX")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("amx")


@pytest.fixture(scope="module")
def functions_path(folder):
    return amx_functions.build(folder)


@pytest.fixture(scope="module")
def emulator(folder):
    return amx.Emulator(amx.build(folder))


@pytest.fixture
def call(functions_path, request):
    """The function of amx_functions.load. The tiles are released after the test."""
    if NATIVE:
        assert ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0, "the kernel does not permit tiles"
    else:
        request.getfixturevalue("emulator")
    call = amx_functions.load(functions_path)
    yield call
    call("release")


def random_bytes(*shape):
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


# Configuration


@pytest.mark.parametrize("how", ["", "_by_index", "_by_rip", "_by_thread", "_absolute"])
def test_configuration(how, call):
    memory, found = random_bytes(512), random_bytes(512)
    memory[64 + 200 :][:64] = memory[:64] = CONSTANT
    if how == "_absolute":
        at_absolute_address(CONSTANT)
    call(f"configure{how}", memory, stride=100)
    call("read_configuration", found, offset=3)
    assert np.array_equal(found[3:67], CONSTANT)
    expected = found.copy()
    expected[264:328] = CONSTANT
    call("read_configuration_by_index", found, stride=100)
    assert np.array_equal(found, expected)


def at_absolute_address(data):
    """Puts the bytes at ABSOLUTE."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4]
    anonymous_at_fixed_address = 0x100022
    libc.mmap(ABSOLUTE, 4096, 3, anonymous_at_fixed_address, -1, 0)  # It fails the second time, harmlessly.
    ctypes.memmove(ABSOLUTE, data.ctypes.data, data.nbytes)


@pytest.mark.parametrize("how", ["tilerelease", "palette 0"])
def test_release(how, call, request):
    call("configure", CONSTANT)
    configured = None if NATIVE else request.getfixturevalue("emulator").configured
    assert NATIVE or configured()
    call(*("release",) if how == "tilerelease" else ("configure", configuration(b0=0, b7=7)))
    assert NATIVE or not configured()
    found = random_bytes(64)
    call("read_configuration", found)
    assert not found.any()


def test_tiles_begin_at_zero(call):
    """ldtilecfg clears all tiles, and tilezero clears one."""
    memory, found = random_bytes(2, 2, 8), np.empty((2, 2, 8), np.uint8)
    for again in ("configure", "zero0"):
        call("configure", configuration((2, 8), (2, 8)))
        call("load0", memory[0], stride=8)
        call("load1", memory[1], stride=8)
        call(again, configuration((2, 8), (2, 8)))
        call("store0", found[0], stride=8)
        call("store1", found[1], stride=8)
        assert not found[0].any()
        assert np.array_equal(found[1], memory[1] if again == "zero0" else np.zeros((2, 8)))


# Loads and stores


def rows_of(memory, first, stride, rows, row_bytes):
    """Returns a view of a tile in memory."""
    return np.lib.stride_tricks.as_strided(memory[first:], (rows, row_bytes), (stride, 1))


@pytest.mark.parametrize("rows, row_bytes", [(16, 64), (5, 12), (1, 4), (16, 4), (3, 64)])
@pytest.mark.parametrize("stride", [64, 200, 65, 0, -72])
def test_shapes_and_strides(rows, row_bytes, stride, call):
    memory = random_bytes(8192)
    call("configure", configuration((rows, row_bytes)))
    call("load0", memory, stride, offset=4096)
    found = np.full((17, 64), 7, np.uint8)
    call("store0", found, stride=64)
    expected = np.full((17, 64), 7, np.uint8)
    expected[:rows, :row_bytes] = rows_of(memory, 4096, stride, rows, row_bytes)
    assert np.array_equal(found, expected)
    spread, expected = memory.copy(), memory.copy()
    call("load0", found, stride=64)
    call("store0", spread, stride, offset=4099)
    for row in range(rows):
        expected[4099 + row * stride :][:row_bytes] = found[row, :row_bytes]
    assert np.array_equal(spread, expected)


def test_addresses(call):
    """Every base with every index, with scales and displacements of all lengths, for every tile."""
    middle, unit, rows, row_bytes = 1 << 17, 24, 5, 12
    memory = random_bytes(middle + 8192)
    call("configure", configuration(*[(rows, row_bytes)] * 8))
    for n, (base, _, scale, displacement) in enumerate(addresses()):
        expected = rows_of(memory, middle + displacement, unit * scale, rows, row_bytes)
        for name in ("load_at", "hinted_load_at"):
            found = np.zeros((rows, row_bytes), np.uint8)
            call(f"zero{n % 8}")
            call(f"{name}{n}", memory, unit, offset=middle)
            call(f"store{n % 8}", found, stride=row_bytes)
            assert np.array_equal(found, expected), amx_functions.code()[f"{name}{n}"]
        written, expected_around = np.zeros_like(memory), np.zeros_like(memory)
        call(f"store_at{n}", written, unit, offset=middle)
        rows_of(expected_around, middle + displacement, unit * scale, rows, row_bytes)[:] = expected
        first = middle - 128 if base == "rsp" else 0
        assert np.array_equal(written[first:], expected_around[first:]), amx_functions.code()[f"store_at{n}"]


@pytest.mark.parametrize("name", ["load_without_index", "load_absolute"])
def test_addresses_without_register(name, call):
    memory, found = random_bytes(512), np.zeros((3, 8), np.uint8)
    at_absolute_address(memory)
    call("configure", CONSTANT)
    call(name, memory, stride=100)
    call("store0", found, stride=8)
    first, stride = (16, 0) if name == "load_without_index" else (64, 100)
    assert np.array_equal(found, rows_of(memory, first, stride, 3, 8))


# Products


def as_float(bfloat16):
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def random_bfloat16(*shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def exact_product(sums, left, right):
    """Float32 (m, n), bfloat16 (m, 2 k) and (k, 2 n), to float32 (m, n) with the processor's rounding.

    A product of two bfloat16 numbers is exact in float32, so a separate addition rounds as a fused one does.
    """
    left, right = as_float(left), as_float(right)
    even = odd = np.zeros_like(sums)
    for k in range(len(right)):
        even = even + left[:, 2 * k, None] * right[k, 0::2]
        odd = odd + left[:, 2 * k + 1, None] * right[k, 1::2]
    return sums + (even + odd)


def assert_product(found, sums, left, right):
    (k, n), x = (right.shape[0], right.shape[1] // 2), as_float(left).astype(np.float64)
    y = as_float(right).astype(np.float64).reshape(k, n, 2).transpose(0, 2, 1).reshape(2 * k, n)
    np.testing.assert_allclose(found, sums + x @ y, rtol=0, atol=2e-6 * (np.abs(sums) + np.abs(x) @ np.abs(y)).max())
    if not NATIVE:  # Intel documents this order.
        assert np.array_equal(found, exact_product(sums, left, right))


@pytest.mark.parametrize("m, n, k", [(16, 16, 16), (5, 3, 7), (1, 1, 1), (16, 1, 5), (3, 16, 2), (2, 5, 16)])
def test_products(m, n, k, call):
    sums, left, right = as_float(random_bfloat16(m, n)) / 3, random_bfloat16(m, 2 * k), random_bfloat16(k, 2 * n)
    call("configure", configuration((m, 4 * n), (m, 4 * k), (k, 4 * n)))
    for tile, x in enumerate((sums, left, right)):
        call(f"load{tile}", x, stride=x.strides[0])
    call("multiply012")
    found = np.zeros_like(sums)
    call("store0", found, stride=4 * n)
    assert_product(found, sums, left, right)


def test_products_of_all_tiles(call):
    """A product changes the tile of sums and no other tile."""
    tiles = random_bfloat16(8, 16, 32)
    call("configure", configuration(*[(16, 64)] * 8))
    for sums, left, right in permutations(range(8), 3):
        for n in range(8):
            call(f"load{n}", tiles[n], stride=64)
        call(f"multiply{sums}{left}{right}")
        found = np.zeros_like(tiles)
        for n in range(8):
            call(f"store{n}", found[n], stride=64)
        others = [n for n in range(8) if n != sums]
        assert np.array_equal(found[others], tiles[others])
        assert_product(found[sums].view(np.float32), tiles[sums].view(np.float32), tiles[left], tiles[right])


EDGES = {  # the sum before, pairs of the left and the right tile, and the sum afterwards
    "denormal-left": (0, [(2**-130, 0)], [(2**120, 0)], 0),
    "denormal-right": (0, [(0, 2**120)], [(0, 2**-130)], 0),
    "denormal-sum": (2**-140, [(0, 0)], [(0, 0)], 0),
    "denormal-product": (0, [(2**-70, 0)], [(2**-69, 0)], 0),
    "denormal-difference": (0, [(2**-63, -(2**-63))], [(2**-63, 1.5 * 2**-63)], 0),
    "denormal-result": (1.5 * 2**-126, [(2**-63, 0)], [(-(2**-63), 0)], 0),
    "fused": (0, [(2**-63, 0), (2**-64, 0)], [(2**-63, 0), (2**-63, 0)], 1.5 * 2**-126),
    "even-and-odd-first": (-(2**24), [(2**12, 1)], [(2**12, 1)], 0),
    "even-apart-from-odd": (0, [(2**12, 1), (1, -(2**12))], [(2**12, 1), (1, 2**12)], 1),
    "ties-to-even": (0, [(2**12, 1)], [(2**12, 3)], 2**24 + 4),
    "overflow": (0, [(2**100, 0)], [(2**100, 0)], np.inf),
    "infinite": (-np.inf, [(1, 1)], [(1, 1)], -np.inf),
    "infinite-by-zero": (0, [(np.inf, 0)], [(0, 0)], np.nan),
    "nan": (0, [(0, np.nan)], [(0, 0)], np.nan),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name, call):
    before, left, right, after = EDGES[name]
    top_half = lambda pairs: (np.array(pairs, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    call("configure", configuration((1, 4), (1, 4 * len(left)), (len(left), 4)))
    sums = np.array([before], np.float32)
    call("load0", sums)
    call("load1", top_half(left))
    call("load2", top_half(right), stride=4)
    call("multiply012")
    call("store0", sums)
    assert np.array_equal(sums, [np.float32(after)], equal_nan=True), sums


def test_rounding_is_the_instructions_own(call):
    """A product neither reads MXCSR, here to round upwards, nor sets its flags."""
    sums, left, right = np.zeros((16, 16), np.float32), random_bfloat16(16, 32), random_bfloat16(16, 32, seed=1)
    call("configure", configuration(*[(16, 64)] * 3))
    call("load1", left, stride=64)
    call("load2", right, stride=64)
    state, found = np.zeros(1, np.uint32), np.zeros_like(sums)
    call("rounding", state)
    call("store0", found, stride=64)
    assert_product(found, sums, left, right)
    assert state[0] == 0x5F80


# Threads and counts


def test_threads_have_their_own_tiles(call):
    everybody = Barrier(4)

    def work(seed):
        sums, left, right = (random_bfloat16(16, 32, seed=10 * seed + n) for n in range(3))
        call("configure", configuration(*[(16, 64)] * 3))
        for _ in range(50):
            everybody.wait(timeout=60)
            for tile, x in enumerate((sums, left, right)):
                call(f"load{tile}", x, stride=64)
            call("multiply012")
            found = np.zeros((16, 16), np.float32)
            call("store0", found, stride=64)
            assert_product(found, sums.view(np.float32), left, right)
        call("release")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4
    found = random_bytes(64)
    call("read_configuration", found)
    assert not found.any()


@emulated
def test_counts(call, emulator):
    before, memory = emulator.counts(), np.zeros((16, 64), np.uint8)
    names = [("configure", configuration(*[(16, 64)] * 3)), ("read_configuration", memory), ("zero0",)]
    names += [("load1", memory), ("load2", memory), ("hinted_load_at0", memory), ("store0", memory)]
    for arguments in [*names, ("multiply012",), ("multiply021",), ("multiply102",), ("release",)]:
        call(*arguments)
    assert {name: n - before[name] for name, n in emulator.counts().items()} == {
        "ldtilecfg": 1, "sttilecfg": 1, "tilerelease": 1, "tilezero": 1, "tileloadd": 2, "tileloaddt1": 1,
        "tilestored": 1, "tdpbf16ps": 3,
    }  # fmt: skip


# Refusals

CALLS = """
import ctypes, os, sys
emulator, functions = map(ctypes.CDLL, sys.argv[1:3])
for name in sys.argv[4:]:
    memory = (ctypes.c_char * 4096)(*bytes.fromhex(sys.argv[3] if name == "configure" else ""))
    getattr(functions, name)(ctypes.byref(memory), ctypes.c_int64(64))
"""


def run_alone(functions_path, folder, operand, *names, options=()):
    """Calls the functions in a process of their own; returns its status and error output."""
    library = next(folder.glob("libamx.so"), None) or amx.build(folder)
    command = [sys.executable, *options, "-c", CALLS, library, functions_path, bytes(operand).hex(), *names]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stderr


ALL = [(16, 64)] * 8
REFUSED = {
    "palette": (configuration(*ALL, b0=2), ["configure"], "ldtilecfg of palette 2"),
    "start-row": (configuration(*ALL, b1=3), ["configure"], "ldtilecfg with start_row 3, which is not emulated"),
    **{
        f"reserved-{n}": (configuration(*ALL, **{f"b{n}": 9}), ["configure"], f"ldtilecfg with 9 in reserved byte {n}")
        for n in (2, 15, 32, 47, 56, 63)
    },
    "rows": (configuration((17, 64)), ["configure"], "ldtilecfg of tile 0 with 17 rows of 64 bytes"),
    "row-bytes": (configuration((1, 4), (16, 68)), ["configure"], "ldtilecfg of tile 1 with 16 rows of 68 bytes"),
    "many-row-bytes": (configuration(*ALL, b31=1), ["configure"], "ldtilecfg of tile 7 with 16 rows of 320 bytes"),
    "no-rows": (configuration((0, 4)), ["configure"], "ldtilecfg of tile 0 with 0 rows of 4 bytes"),
    "no-row-bytes": (configuration((4, 0)), ["configure"], "ldtilecfg of tile 0 with 4 rows of 0 bytes"),
    **{
        f"unconfigured-{name}": (configuration(*ALL), [name], f"{kind} without a configuration")
        for name, kind in [
            ("load0", "tileloadd"), ("hinted_load_at0", "tileloaddt1"), ("store0", "tilestored"), ("zero0", "tilezero"),
            ("multiply012", "tdpbf16ps"),
        ]
    },
    "released": (configuration(*ALL), ["configure", "release", "load0"], "tileloadd without a configuration"),
    "left-out": (
        configuration((1, 4)), ["configure", "load0", "load1"],
        "tileloadd of tile 1, which the configuration leaves out",
    ),
    "left-out-factor": (
        configuration((1, 4), (1, 4)), ["configure", "multiply012"],
        "tdpbf16ps of tile 2, which the configuration leaves out",
    ),
    "odd-row-bytes": (configuration((1, 6)), ["configure", "load0"], "tileloadd of tile 0 with rows of 6 bytes"),
    "same-tiles": (
        configuration(*ALL), ["configure", "multiply_same"], "tdpbf16ps of tiles 1, 1 and 0, which must differ"
    ),
    "rows-of-product": (
        configuration((5, 12), (6, 8), (2, 12)), ["configure", "multiply012"],
        "tdpbf16ps of 5 rows of 12 bytes from 6 rows of 8 bytes and 2 rows of 12 bytes",
    ),
    "columns-of-product": (
        configuration((5, 12), (5, 8), (2, 8)), ["configure", "multiply012"],
        "tdpbf16ps of 5 rows of 12 bytes from 5 rows of 8 bytes and 2 rows of 8 bytes",
    ),
    "length-of-product": (
        configuration((5, 12), (5, 12), (2, 12)), ["configure", "multiply012"],
        "tdpbf16ps of 5 rows of 12 bytes from 5 rows of 12 bytes and 2 rows of 12 bytes",
    ),
}  # fmt: skip


@emulated
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, functions_path, folder):
    operand, names, message = REFUSED[name]
    status, output = run_alone(functions_path, folder, operand, *names)
    assert (status, output) == (-signal.SIGABRT, f"amx emulator: {message}\n")


@emulated
@pytest.mark.parametrize("name", ILLEGAL)
def test_other_instructions_go_to_the_earlier_handler(name, functions_path, folder):
    """The earlier handler is the usual one, which prints nothing, or Python's faulthandler."""
    alone = lambda *options: run_alone(functions_path, folder, configuration(*ALL), "configure", name, options=options)
    assert alone() == (-signal.SIGILL, "")
    status, output = alone("-X", "faulthandler")
    assert status == -signal.SIGILL and output.startswith("Fatal Python error: Illegal instruction"), output


OUT_OF_BOUNDS = """
#include <cstdlib>
int main(int count, char**) {
  unsigned char configuration[64] = {1};
  configuration[16] = 64, configuration[48] = 16;
  void* const memory = std::malloc(1025 - count);  // one byte too few if there is an argument
  asm volatile("ldtilecfg (%0); tileloadd (%1,%2), %%tmm0; tilerelease"
               : : "r"(configuration), "r"(memory), "r"(64l) : "memory");
  std::free(memory);
}
"""


@emulated
def test_sanitizers_see_tiles(tmp_path):
    """In a sanitized program, a tile that reads beyond its memory is an error, with the program's line."""
    source, program = tmp_path / "out_of_bounds.cpp", tmp_path / "out_of_bounds"
    source.write_text(OUT_OF_BOUNDS)
    flags = "-std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
    subprocess.run(["g++", *flags, source, amx.SOURCE, "-o", program], check=True)
    assert subprocess.run([program], timeout=60).returncode == 0
    done = subprocess.run([program, "short"], stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
    assert "in main" in done.stderr and "out_of_bounds.cpp:7" in done.stderr, done.stderr
