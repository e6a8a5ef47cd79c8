"""Predicts lower bounds of the CUDA kernels' times from counts: ``python -m bench.limits``.

bench.counts counts what the kernels do for a tile, the slots of distances say how many tiles are near, and data sheets
say how much a GPU does per clock. So no kernel can be faster than the busiest part of the GPU allows.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deberta_fast.op.relative_position import SlotTable, slot_table

from . import timing

TOKENS, HEADS, SIZE, BUCKETS, LONGEST = 16384, 12, 64, 256, 512
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COUNTED = timing.REPOSITORY / "bench/results/compile/counts.md"
UNIT = 128 * 64  # pairs that a row of the counts is for
ROWS = 128  # of a block, in all kernels
COLUMNS = {"forward": 64, "backward": 128}  # that are near or far together
NEAR_BYTES, FILLING, MOST_BYTES = 32 << 20, 256, 160 << 20  # of dA at once, and blocks: csrc/cuda/plan.cpp
FLOPS_OF_MMA = 2 * 16 * 8 * 16
LAUNCH = 2.5e-6  # seconds from one kernel's last block to the next one's first, where launches are queued; a guess


class Chip(NamedTuple):
    processors: int
    clock: float  # Hz, at which the data sheet's TFLOP/s are reached
    mma: float  # FLOP of mma.sync in bfloat16 per clock and multiprocessor
    memory: float  # bytes per second
    cache: int  # bytes of the second-level cache
    cache_bytes: float  # from the second-level cache per clock and multiprocessor


# SMs, clocks, memory and caches: NVIDIA's white papers of A100 (2020) and H100 (2022), data sheets of H200 (2024) and
# B200 (2025). mma.sync: on A100 the peak, 312 TFLOP/s; on Hopper 62.9 % of the peak of 4096 that only wgmma reaches
# (Luo et al., arXiv 2402.13499); on B200 a public microbenchmark's 8.5 clocks for a product m16n8k16 and quarter of a
# multiprocessor. Second-level cache: A100's white paper has 5120 bytes a clock; 5.5 TB/s were measured on an H100 PCIe
# of 114 SMs (chipsandcheese.com, 2023), and B200 is assumed to be like it.
CHIPS = {
    "A100": Chip(108, 1.41e9, 2048, 2.039e12, 40 << 20, 5120 / 108),
    "H100": Chip(132, 1.83e9, 0.629 * 4096, 3.35e12, 50 << 20, 27.5),
    "H200": Chip(132, 1.83e9, 0.629 * 4096, 4.8e12, 50 << 20, 27.5),
    "B200": Chip(148, 1.86e9, 4 * FLOPS_OF_MMA / 8.5, 8e12, 126 << 20, 27.5),
}
# Per clock and multiprocessor, CUDA C++ Programming Guide (compute capabilities 8.0 to 10.0; arithmetic throughput):
# 32 banks of 4 bytes, which are 128 bytes of shared memory or first-level cache; four schedulers; 16 exponentials.
WAVEFRONTS, ISSUED, EXPONENTIALS = 1, 4, 16

# TFLOP/s of plain attention on an H100 SXM in float16, head size 64, no causal mask, 16384 tokens, width 2048, by
# length: figures of Dao-AILab/flash-attention (assets/flash3_fp16_fwd.png) and of arXiv 2407.08608. FlashAttention 3
# took 4 % more on an H200 in forward and 3.5 % less in backward (issue 1438 there), so these serve for both.
PLAIN = {
    "forward": {
        "FA2": dict(zip(LENGTHS[2:], (282, 306, 318, 321, 322, 324))),
        "cuDNN": dict(zip(LENGTHS[2:], (335, 373, 395, 408, 412, 413))),
        "FA3": dict(zip(LENGTHS[2:], (333, 392, 460, 476, 496, 497))),
    },
    "backward": {
        "FA2": dict(zip(LENGTHS[2:], (198, 238, 264, 279, 287, 291))),
        "cuDNN": dict(zip(LENGTHS[2:], (266, 348, 395, 417, 432, 433))),
        "FA3": dict(zip(LENGTHS[2:], (272, 363, 422, 453, 472, 474))),
    },
}
INSIDE = ("tensor", "shared", "issue", "exp")  # parts of a multiprocessor
LEGEND = (
    "Microseconds for 16384 tokens, 12 heads of 64, bfloat16. tensor, shared (with tables from the first-level cache), "
    "issue, exp, L2 (where tables are never read), memory: what each part of the GPU takes, all kernels together. "
    "bound: the busiest part's time, summed over kernels, which run one after the other, and launches. binds: the part "
    "that most of it is of. in turn: the sum of all parts, as if nothing overlapped. plain: the fastest published "
    "plain attention. expected: as the bound, but in each kernel a share of the time of the other parts of a "
    "multiprocessor does not overlap: the share with which far tiles alone would take the published time of "
    "FlashAttention 2, which is made like them. The bound leaves out latencies, idle multiprocessors at the end of a "
    "launch, and clocks below the data sheet's; the expected time has them as FlashAttention 2 has."
)


class Counts(NamedTuple):
    """A row of bench.counts: what a kernel does for a unit of near or far pairs, and once for a block."""

    kernel: str
    tiles: str
    wavefronts: float  # of shared memory and of tables
    mma: float
    instructions: float
    bytes: float
    wavefronts_once: float
    mma_once: float

    @property
    def way(self) -> str:
        return "forward" if self.kernel.startswith("forward") else "backward"


class Counted(NamedTuple):
    rows: list[Counts]
    launches: dict[str, int]  # forward, backward, group: of a further group of heads
    passes: tuple[float, float]  # dA is written and read


def read(path: Path) -> Counted:
    """Reads what bench.counts wrote."""
    text = path.read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rows, heads = [], []
    for cells in lines:
        if cells[0] == "kernel":
            heads = cells
        elif "tiles" in heads and not set(cells[0]) <= set("-:"):
            row = dict(zip(heads, cells, strict=True))
            number = lambda name, row=row: float(row[name] or 0)
            rows.append(
                Counts(
                    row["kernel"],
                    row["tiles"],
                    number("shared") + number("tables"),
                    number("mma"),
                    number("instr/pair") * UNIT / 32,
                    1024 * (number("copied") + number("written")),
                    number("shared once") + number("tables once"),
                    number("mma once"),
                )  # fmt: skip
            )
    launches = re.search(r"(\d+) forward, (\d+) backward, (\d+) more", text)
    passes = re.search(r"written ([\d.]+) times, read ([\d.]+) times", text)
    return Counted(
        rows,
        dict(zip(("forward", "backward", "group"), map(int, launches.groups()))),
        tuple(map(float, passes.groups())),
    )


def tiles_of(length: int, rows: int, columns: int, table: SlotTable) -> tuple[int, int]:
    """Returns how many tiles of a square of scores are near, and how many far."""
    near = 0
    for row in range(0, length, rows):
        for column in range(0, length, columns):
            # Distances are those of query minus key.
            first, last = row - (column + columns - 1), row + rows - 1 - column
            near += last > table.far_future and first < table.far_past
    return near, -(-length // rows) * -(-length // columns) - near


class Bound(NamedTuple):
    """Seconds of each part of the GPU, and a bound of all."""

    parts: dict[str, float]
    kernels: dict[str, dict[str, float]]  # the same of each kernel
    seconds: float
    binds: str
    near: float  # share of the tiles
    launches: int


def bound(chip: Chip, counted: Counted, length: int, way: str, tokens: int = TOKENS, heads: int = HEADS) -> Bound:
    table, squares = slot_table(BUCKETS, LONGEST), tokens // length * heads
    near, far = tiles_of(length, ROWS, COLUMNS[way], table)
    units = {"near": near * squares * ROWS * COLUMNS[way] / UNIT, "far": far * squares * ROWS * COLUMNS[way] / UNIT}
    blocks = squares * -(-length // ROWS)
    kernels: dict[str, dict[str, float]] = {}
    for row in counted.rows:
        if row.way == way:
            parts = kernels.setdefault(row.kernel, {})
            for name, seconds in _seconds(chip, row, units[row.tiles], blocks if units[row.tiles] else 0).items():
                parts[name] = parts.get(name, 0) + seconds
    per_head = units["near"] * UNIT * 2 / heads if way == "backward" and counted.passes[0] else 0.0
    groups = -(-heads // _heads_at_once(per_head, blocks // heads)) if per_head else 1
    launches = counted.launches[way] + (groups - 1) * (counted.launches["group"] if way == "backward" else 0)
    traffic = _traffic(chip, counted, way, tokens * heads * SIZE * 2, per_head * heads, per_head * heads / groups)
    # Its traffic is divided among the kernels evenly.
    for parts in kernels.values():
        parts["memory"] = traffic / chip.memory / len(kernels)
    totals: dict[str, float] = {}
    binding: dict[str, float] = {}
    for parts in kernels.values():
        worst = max(parts, key=lambda name: parts[name])
        binding[worst] = binding.get(worst, 0) + parts[worst]
        for name, seconds in parts.items():
            totals[name] = totals.get(name, 0) + seconds
    totals["launches"] = binding["launches"] = launches * LAUNCH
    binds = max(binding, key=lambda name: binding[name])
    return Bound(totals, kernels, sum(binding.values()), binds, near / (near + far), launches)


def _heads_at_once(bytes_of_head: float, blocks_of_head: int) -> int:
    """As in csrc/cuda/plan.cpp: what the second-level cache should hold, or enough blocks to fill a GPU."""
    filling = min(-(-FILLING // blocks_of_head), MOST_BYTES // bytes_of_head)
    return max(1, int(max(NEAR_BYTES // bytes_of_head, filling)))


def _seconds(chip: Chip, row: Counts, units: float, blocks: int) -> dict[str, float]:
    clocks = {
        "tensor": (row.mma * units + row.mma_once * blocks) * FLOPS_OF_MMA / chip.mma,
        "shared": (row.wavefronts * units + row.wavefronts_once * blocks) / WAVEFRONTS,
        "issue": row.instructions * units / ISSUED,
        "exp": _exponentials(row) * units / EXPONENTIALS,
        "L2": row.bytes * units / chip.cache_bytes,
    }
    return {name: x / (chip.processors * chip.clock) for name, x in clocks.items()}


def _exponentials(row: Counts) -> int:
    """One for each pair, except where dA is read from memory."""
    return 0 if "by_distance" in row.kernel or ("query" in row.kernel and row.tiles == "near") else UNIT


def _traffic(chip: Chip, counted: Counted, way: str, tensor: int, near: float, group: float) -> float:
    """Returns the bytes that memory moves: each tensor once, and dA unless a group of heads stays in the cache."""
    tensors = {"forward": 4, "backward": 8 + 3}[way]  # backward_delta reads O and dO, and Q or K is read twice
    return tensors * tensor + (sum(counted.passes) * near if group > chip.cache else 0)


def plain_us(way: str, length: int, name: str, tokens: int = TOKENS) -> float | None:
    """Returns the published time of plain attention for these tokens, which are as many as in the figures."""
    rate = PLAIN[way][name].get(length)
    flops = {"forward": 4, "backward": 10}[way] * length * tokens * HEADS * SIZE
    return None if rate is None else flops / rate / 1e6


def not_overlapped(chip: Chip, counted: Counted, length: int) -> float:
    """Returns the share of other parts' time with which far tiles alone take FlashAttention 2's published time."""
    length = max(length, 512)  # there are no figures of shorter sequences
    [far] = [row for row in counted.rows if (row.kernel, row.tiles) == ("forward_kernel", "far")]
    parts = _seconds(chip, far, length * TOKENS * HEADS / UNIT, TOKENS // ROWS * HEADS)
    times = [parts[name] for name in INSIDE]
    return (plain_us("forward", length, "FA2") / 1e6 - max(times)) / (sum(times) - max(times))


def expected(chip: Chip, counted: Counted, length: int, way: str) -> float:
    """Returns seconds; see LEGEND."""
    share, found = not_overlapped(chip, counted, length), bound(chip, counted, length, way)
    total = found.parts["launches"]
    for parts in found.kernels.values():
        times = [parts[name] for name in INSIDE]
        total += max(max(times) + share * (sum(times) - max(times)), *parts.values())
    return total


def rows(name: str, counted: Counted, measured: dict[tuple[int, str], float]) -> Iterator[dict]:
    for way in ("forward", "backward"):
        for length in LENGTHS:
            found = bound(CHIPS[name], counted, length, way)
            row = {"gpu": name, "pass": way, "length": length, "near": f"{100 * found.near:.0f} %"}
            row |= {part: round(1e6 * x) for part, x in found.parts.items()}
            row |= {"bound": round(1e6 * found.seconds), "binds": found.binds}
            row["in turn"] = round(1e6 * sum(found.parts.values()))
            if name in ("H100", "H200"):  # the published times' GPUs
                row["expected"] = round(1e6 * expected(CHIPS[name], counted, length, way))
                if length in PLAIN[way]["FA2"]:
                    row["plain"] = round(min(plain_us(way, length, who) for who in PLAIN[way]))
                    row |= {f"{what}/plain": row[what] / row["plain"] for what in ("bound", "expected")}
            if (length, way) in measured:
                row["measured"] = measured[length, way]
            yield row


def measured_us(name: str) -> dict[tuple[int, str], float]:
    """Returns the times of the cuda backend in bench/results on GPUs of this name, by length and pass."""
    found = {}
    for path in sorted((timing.REPOSITORY / "bench/results").glob(f"*{name}*/attention.json")):
        for row in json.loads(path.read_text())["rows"]:
            if row.get("variant") == "cuda" and "ms" in row:
                found[row["length"], row["pass"]] = 1e3 * row["ms"]
    return found


def draw(table: list[dict], path: Path) -> None:
    """Draws the parts of each pass over the length, relative to published plain attention where there is one."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["gpu"] for row in table))
    figure, panels = pyplot.subplots(len(names), 2, figsize=(11, 4 * len(names)), squeeze=False)
    for line, name in zip(panels, names):
        for panel, way in zip(line, ("forward", "backward")):
            found = [row for row in table if (row["gpu"], row["pass"]) == (name, way)]
            lengths = [row["length"] for row in found]
            for part in ("tensor", "shared", "issue", "exp", "L2", "memory", "launches"):
                panel.plot(lengths, [row[part] for row in found], "-", linewidth=1, label=part)
            panel.plot(lengths, [row["bound"] for row in found], "k-", linewidth=2, label="bound")
            for what, style in (("plain", "k--"), ("expected", "r:"), ("measured", "rx")):
                there = [(row["length"], row[what]) for row in found if row.get(what)]
                if there:
                    panel.plot(*zip(*there), style, label=what)
            panel.set(title=f"{name}, {way}", xlabel="length", ylabel="microseconds", xscale="log", yscale="log")
            panel.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    for line in panels:
        line[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__.split(":")[0])
    parser.add_argument("--gpus", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--counts", type=Path, default=COUNTED, metavar="FILE", help="what bench.counts wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write table, provenance and chart to DIR")
    arguments = parser.parse_args()
    timing.provenance()
    counted = read(arguments.counts)
    table = [row for name in arguments.gpus for row in rows(name, counted, measured_us(name))]
    print(f"{timing.markdown(table)}\n\n{LEGEND}")
    if arguments.out:
        timing.save("limits", table, arguments.out, LEGEND)
        try:
            draw(table, arguments.out / "limits.png")
        except ImportError:
            print("no chart: matplotlib is not installed")


if __name__ == "__main__":
    main()
