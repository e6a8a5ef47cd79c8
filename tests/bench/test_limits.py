"""The model of the kernels' limits: tiles, parts of the GPU, counts; main loops in machine code."""

import shutil
import subprocess
import sys

import pytest

from bench import limits, sass, timing
from bench.limits import CHIPS, COUNTED, Counted, Counts
from deberta_fast.op.relative_position import slot_table


@pytest.mark.parametrize("length, rows, columns", [(192, 32, 16), (100, 64, 32), (40, 128, 64), (60, 1, 1)])
@pytest.mark.parametrize("buckets, longest", [(16, 32), (-1, 40)])
def test_tiles(length, rows, columns, buckets, longest):
    """A tile is near if a distance in it is not in the constant ends of the table of slots."""
    table, near, far = slot_table(buckets, longest), 0, 0
    for row in range(0, length, rows):
        for column in range(0, length, columns):
            distances = [i - j for i in range(row, row + rows) for j in range(column, column + columns)]
            is_near = any(table.far_future < distance < table.far_past for distance in distances)
            near, far = near + is_near, far + (not is_near)
    assert near > 0 and limits.tiles_of(length, rows, columns, table) == (near, far)


def counted(**changed: float) -> Counted:
    nothing = dict(wavefronts=0, mma=0, instructions=0, bytes=0, wavefronts_once=0, mma_once=0)
    rows = [Counts("forward_kernel", tiles, **nothing | changed) for tiles in ("near", "far")]
    return Counted(rows, dict(forward=1, backward=1, group=1), (0.0, 0.0))


@pytest.mark.parametrize(
    "changed, binds, clocks",
    [
        (dict(mma=1e5), "tensor", 1e5 * 4096 / 2048),
        (dict(wavefronts=1e5), "shared", 1e5),
        (dict(instructions=1e6), "issue", 1e6 / 4),
        (dict(), "exp", 8192 / 16),
        (dict(bytes=1e8), "L2", 1e8 / (5120 / 108)),
        (dict(wavefronts=1e3, wavefronts_once=1e6), "shared", 1e3 + 2 * 1e6 / 256),  # for near and for far tiles
    ],
)
def test_what_binds(changed, binds, clocks):
    """At a length of 16384 a block of 128 queries has 256 units of 128 x 64 pairs."""
    found = limits.bound(CHIPS["A100"], counted(**changed), 16384, "forward")
    units = 12 * 128 * 256
    assert found.binds == binds and found.launches == 1
    assert found.seconds - limits.LAUNCH == pytest.approx(units * clocks / (108 * 1.41e9), rel=0.01)


def test_memory_and_launches():
    """Where there is little to compute, tensors are moved once; what fits into the cache is not moved again."""
    found = limits.bound(CHIPS["A100"], counted(), 128, "forward")
    assert found.binds == "memory" and found.parts["memory"] == pytest.approx(4 * 16384 * 768 * 2 / 2.039e12)
    rows = [row._replace(kernel="backward_key_kernel") for row in counted().rows]
    stored = Counted(rows, dict(forward=1, backward=9, group=6), (1.0, 3.0))
    one, other = (limits.bound(CHIPS[name], stored, 2048, "backward") for name in ("A100", "B200"))
    more = one.parts["memory"] * 2.039e12 - other.parts["memory"] * 8e12
    near, _ = limits.tiles_of(2048, 128, 128, slot_table(256, 512))
    scores = 8 * 12 * near * 128 * 128 * 2
    assert more == pytest.approx(4 * scores)  # dA of two heads is 67 MB, which B200's cache holds
    assert one.launches == 9 + 6 * 5 and limits.bound(CHIPS["A100"], stored, 128, "backward").launches == 9 + 6


def test_bounds_rise_with_length():
    known = limits.read(COUNTED)
    for chip in CHIPS.values():
        for way in ("forward", "backward"):
            found = [limits.bound(chip, known, length, way) for length in limits.LENGTHS]
            seconds = [x.seconds for x in found]
            assert seconds == sorted(seconds) and [x.near for x in found] == sorted(
                (x.near for x in found), reverse=True
            )
            if chip is CHIPS["H200"]:
                times = [limits.expected(chip, known, length, way) for length in limits.LENGTHS]
                assert all(x < y for x, y in zip(seconds, times))


def test_far_tiles_alone_take_what_flash_attention_takes():
    """By definition of the expected time."""
    known, chip = limits.read(COUNTED), CHIPS["H200"]
    far = known.rows[[(x.kernel, x.tiles) for x in known.rows].index(("forward_kernel", "far"))]
    alone = Counted([far._replace(tiles="near"), far], dict(known.launches, forward=0), known.passes)
    for length in limits.LENGTHS[2:]:
        got = 1e6 * limits.expected(chip, alone, length, "forward")
        assert got == pytest.approx(limits.plain_us("forward", length, "FA2"), rel=0.1 if length < 4096 else 0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ on Linux")
def test_counts_are_those_of_the_kernels(tmp_path):
    """The counts that bench/results keeps are those of this commit's kernels: if not, run bench.counts again."""
    command = [sys.executable, "-m", "bench.counts", "--emulated", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=timing.REPOSITORY)
    now, kept = limits.read(tmp_path / "counts.md"), limits.read(COUNTED)
    for row, expected in zip(now.rows, kept.rows, strict=True):
        assert row._replace(instructions=0) == expected._replace(instructions=0)
        assert row.wavefronts > 0 and row.mma > 0 and expected.instructions > 0
    assert now[1:] == kept[1:]


def line(address: int, text: str) -> str:
    return f"        /*{address:04x}*/                   {text} ;  /* 0x0000000000007919 */\n"


def test_an_iteration_is_the_shortest_way_that_does_the_work():
    """Two loops: one with a copy that is left out, a branch for rare tiles and products in a loop; one without."""
    texts = {
        0x00: "S2R R0, SR_TID.X",
        0x10: "@P0 BRA 0x30",
        0x20: "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]",
        0x30: "@!P1 BRA 0x60",
        0x40: "FADD R1, R1, R2",
        0x50: "FADD R1, R1, R2",
        0x60: "LDSM.16.M88.4 R8, [R4]",
        0x70: "HMMA.16816.F32.BF16 R4, R8, R10, R4",
        0x80: "@P2 HMMA.16816.F32.BF16 R4, R8, R10, R4",
        0x90: "@P3 BRA 0x60",
        0xA0: "NOP",
        0xB0: "@P4 BRA 0x10",
        0xC0: "FADD R1, R1, R2",
        0xD0: "HMMA.16816.F32.BF16 R4, R8, R10, R4",
        0xE0: "UISETP.NE.AND UP0, UPT, UR4, URZ, UPT",
        0xF0: "BRA.U UP0, 0xc0",
        0x100: "EXIT",
        0x110: "BRA 0x110",
    }
    code = "\t\tFunction : one\n" + "".join(line(address, text) for address, text in texts.items())
    # 0x10, 0x20, 0x30, then k times 0x60 to 0x90, then 0xb0
    for k in (1, 2, 3):
        assert sass.executed(code, sass.Work(k, 1, k)) == 4 + 4 * k
        assert sass.executed(code, sass.Work(2 * k, 1, k)) == 4 + 4 * k
    always = code.replace("@P2 ", "")
    assert sass.executed(always, sass.Work(5, 1, 2.5)) == 14  # between warps that pass the inner loop twice and thrice
    assert sass.executed(code, sass.Work(1, 0, 0)) == 4
    assert sass.executed(code, sass.Work(1, 2, 1)) is None
