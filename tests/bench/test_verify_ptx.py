"""What bench.verify_ptx hands to the verifier: the kernel's PTX without bfi, and the arguments of a launch."""

import re
import struct
from collections import Counter

import pytest

from bench import counts, verify_ptx

KERNEL = """
.extern .shared .align 16 .b8 bytes[];

.entry kernel(
	.param .align 8 .b8 kernel_param_0[64]
)
{
	.reg .b32 	%r<9>;
	mov.b64 	%rd1, kernel_param_0;
	add.s64 	%rd2, %rd1, 24;
	ld.param.u32 	%r1, [kernel_param_0+4];
	ld.param.u64 	%rd3, [%rd2+-16];
	ld.param.v2.u32 	{%r2, %r3}, [%rd2+8];
	ld.param.u32 	%r4, [%rd2];
	ld.param.u64 	%rd4, [kernel_param_0+24];
	ld.param.f32 	%f1, [kernel_param_0+40];
	bfi.b32 	%r5, %r1, %r2, 3, 29;
	bar.sync 	0;
	cp.async.wait_group 0;
	bar.warp.sync 	-1;
	bar.sync 	0;
}
"""


def test_fields_and_values():
    """A pointer becomes an object, a stride a value; a field is read once, in its widest type."""
    memory = bytearray(64)
    for offset, kind, value in ((4, "<I", 7), (8, "<Q", 0x7F0012345600), (24, "<Q", 4096), (32, "<II", (1, 2))):
        struct.pack_into(kind, memory, offset, *(value if isinstance(value, tuple) else (value,)))
    struct.pack_into("<f", memory, 40, 0.5)
    launch = counts.Launch("kernel", (3, 100), 128, 1024, bytes(memory), Counter())
    got = verify_ptx.config(KERNEL, launch)
    assert got["launch"] == {"grid_dim": [3, 2, 1], "block_dim": [128, 1, 1], "dynamic_shared_bytes": 1024}
    values = {field["offset"]: (field["type"], field["value"]) for field in got["arguments"]}
    assert values == {4: ("u32", 7), 24: ("u64", 4096), 32: ("u32", 1), 36: ("u32", 2), 40: ("f32", 0.5)}
    [pointer] = got["declarations"]
    assert (pointer["offset"], pointer["type"], pointer["object"]) == (8, "pointer", "at7f0012345600")


@pytest.mark.parametrize("first, count", [(3, 29), (4, 28), (0, 5), (30, 2), (28, 9)])
def test_bit_fields(first, count):
    """The instructions in bfi's place compute what the PTX manual says of it."""
    text = verify_ptx.without_bfi(KERNEL.replace("3, 29;", f"{first}, {count};"))
    assert "bfi" not in text and ".reg .b32 %field<2>;" in text
    field, rest = 0xDEADBEEF, 0x12345678
    registers = {"%r1": field, "%r2": rest}
    for name, to, x, y in re.findall(r"(shl|and|or)\.b32 (%\w+), (%\w+), (%?\w+);", text):
        y = registers[y] if y in registers else int(y)
        x = registers[x]
        registers[to] = {"shl": x << y, "and": x & y, "or": x | y}[name] & 0xFFFFFFFF
    expected = rest
    for i in range(count):
        if first + i < 32:
            expected = expected & ~(1 << first + i) | (field >> i & 1) << first + i
    assert registers["%r5"] == expected


def test_mutants():
    found = list(verify_ptx.mutants(KERNEL))
    assert [site.split()[0] for site, *_ in found] == [
        "bar.sync", "cp.async.wait_group", "bar.warp.sync", "bar.sync",
    ]  # fmt: skip
    for _, without, raced in found:
        for mutant in (without, raced):
            [(old, new)] = [
                (x.strip(), y.strip()) for x, y in zip(KERNEL.splitlines(), mutant.splitlines(), strict=True) if x != y
            ]
            assert new == f"//{old}" if mutant == without else "st.shared.u32 [bytes], %raced;" in new
