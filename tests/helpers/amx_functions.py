"""Assembly functions that execute one instruction of AMX each, for test_amx_emulator.py.

Each function takes an address in rdi and a stride in rsi.
"""

import ctypes
import subprocess
from itertools import permutations, product
from pathlib import Path

import numpy as np

SAVED = "rbx rbp r12 r13 r14 r15".split()
REGISTERS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
ABSOLUTE = 0x10000000
SIMPLE = {
    "configure": "ldtilecfg (%rdi)",
    "configure_by_index": "ldtilecfg 64(%rdi,%rsi,2)",
    "configure_by_rip": "ldtilecfg configuration(%rip)",
    "configure_by_thread": "mov thread_configuration@gottpoff(%rip), %rax; ldtilecfg %fs:(%rax)",
    "configure_absolute": f"ldtilecfg {ABSOLUTE}",
    "read_configuration": "sttilecfg (%rdi)",
    "read_configuration_by_index": "sttilecfg 64(%rdi,%rsi,2)",
    "release": "tilerelease",
    "load_absolute": f"tileloadd {ABSOLUTE + 64}(,%rsi,1), %tmm0",
    "load_without_index": "tileloadd (%rdi,%rsi), %tmm1; tileloadd 16(%rdi), %tmm0",
    "rounding": "stmxcsr -4(%rsp); movl $0x5f80, -8(%rsp); ldmxcsr -8(%rsp); tdpbf16ps %tmm2, %tmm1, %tmm0;"
    "stmxcsr (%rdi); ldmxcsr -4(%rsp)",
    "multiply_same": ".byte 0xc4, 0xe2, 0x7a, 0x5c, 0xc9",  # tdpbf16ps %tmm0, %tmm1, %tmm1, which assemblers refuse
    **{f"zero{n}": f"tilezero %tmm{n}" for n in range(8)},
    **{f"load{n}": f"tileloadd (%rdi,%rsi), %tmm{n}" for n in range(8)},
    **{f"store{n}": f"tilestored %tmm{n}, (%rdi,%rsi)" for n in range(8)},
    **{f"multiply{s}{x}{y}": f"tdpbf16ps %tmm{y}, %tmm{x}, %tmm{s}" for s, x, y in permutations(range(8), 3)},
}
ILLEGAL = {  # also for the emulator; the .byte are a load and products with one bit changed
    "undefined": "ud2",
    "multiply_bytes": "tdpbssd %tmm2, %tmm1, %tmm0",
    "load_wide": ".byte 0xc4, 0xe2, 0xfb, 0x4b, 0x04, 0x37",
    "load_long": ".byte 0xc4, 0xe2, 0x7f, 0x4b, 0x04, 0x37",
    "load_with_third_operand": ".byte 0xc4, 0xe2, 0x3b, 0x4b, 0x04, 0x37",
    "multiply_tile_8": ".byte 0xc4, 0x62, 0x6a, 0x5c, 0xc1",
    "multiply_by_tile_9": ".byte 0xc4, 0xc2, 0x6a, 0x5c, 0xc1",
    "multiply_by_tile_10": ".byte 0xc4, 0xe2, 0x2a, 0x5c, 0xc1",
}
DATA = """
.data
address: .quad 0
stride: .quad 0
stack: .quad 0
configuration: .byte {0}
.section .tdata,"awT",@progbits
thread_configuration: .byte {0}
"""


def addresses():
    """Yields base, index, scale and displacement: every pair of registers, with scales and displacements in turn."""
    pairs = [(b, i) for b, i in product(REGISTERS, REGISTERS) if b != i != "rsp"]
    for n, (base, index) in enumerate(pairs):
        displacement = (0, 64, -64, 4096, -4096)[n % 5]
        # The frame of the signal lies below the 128 bytes under rsp.
        yield base, index, 1 << n % 4, abs(displacement) if base == "rsp" else displacement


def at_address(instruction, base, index):
    """Returns code that puts rdi into `base` and rsi into `index` around the instruction."""
    return "; ".join([
        "mov %rdi, address(%rip); mov %rsi, stride(%rip)",
        *(f"push %{name}" for name in SAVED),
        "mov %rsp, stack(%rip)",
        f"mov address(%rip), %{base}; mov stride(%rip), %{index}",
        instruction,
        "mov stack(%rip), %rsp",
        *(f"pop %{name}" for name in reversed(SAVED)),
    ])  # fmt: skip


def code() -> dict[str, str]:
    """Returns the code of all functions by name."""
    functions = SIMPLE | ILLEGAL
    for n, (base, index, scale, displacement) in enumerate(addresses()):
        operand, tile = f"{displacement}(%{base},%{index},{scale})", f"%tmm{n % 8}"
        functions[f"load_at{n}"] = at_address(f"tileloadd {operand}, {tile}", base, index)
        functions[f"hinted_load_at{n}"] = at_address(f"tileloaddt1 {operand}, {tile}", base, index)
        functions[f"store_at{n}"] = at_address(f"tilestored {tile}, {operand}", base, index)
    return functions


def configuration(*shapes, **changes):
    """Returns the operand of ldtilecfg for tiles of (rows, bytes in a row); `changes` are bytes, such as b2=1."""
    memory = np.zeros(64, np.uint8)
    memory[0] = 1
    for n, (rows, row_bytes) in enumerate(shapes):
        memory[16 + 2 * n], memory[48 + n] = row_bytes, rows
    for name, value in changes.items():
        memory[int(name[1:])] = value
    return memory


CONSTANT = configuration((3, 8), (2, 64))


def build(folder: Path) -> Path:
    """Assembles the functions into a library in the folder and returns its path."""
    lines = [".text", *(f".globl {name}\n{name}: {body}\nret" for name, body in code().items())]
    source, library = folder / "functions.s", folder / "functions.so"
    source.write_text("\n".join(lines) + DATA.format(", ".join(map(str, CONSTANT))))
    subprocess.run(["g++", "-shared", "-Wl,-z,noexecstack", source, "-o", library], check=True)
    return library


def load(library: Path):
    """Returns a function that calls the assembly function of a name with an array, or a place in it, and a stride."""
    functions = ctypes.CDLL(str(library))

    def call(name, array=None, stride=0, offset=0):
        address = None if array is None else array.ctypes.data + offset
        function = getattr(functions, name)
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        function(address, stride)

    return call
