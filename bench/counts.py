"""Counts what the CUDA kernels do, without a GPU: ``python -m bench.counts``.

The tests' emulator runs small calls and counts wavefronts, bytes, products and barriers of each kernel. nvcc's machine
code tells the instructions of the main loops. Both are given for 128 x 64 pairs of a query and a key, near or far, in
bfloat16 with head size 64 and DeBERTa-v3's tables, without dropout.
"""

import argparse
import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from deberta_fast import disentangled_attention
from deberta_fast.op.relative_position import slot_table

from . import compile_cuda, sass, timing

SIZE, BUCKETS, LONGEST, ROWS = 64, 256, 512, 512
UNIT = 128 * 64  # pairs
OFFSETS = {"near": 0, "far": 1 << 20}  # of the queries; makes every pair of a small call near or far
LENGTHS = 128, 256
CAPABILITY = 90
COLLECTIVES = ("shuffle_xor", "shuffle", "ballot", "sync_warp", "sync_block", "multiply_add")
LEGEND = (
    "Per 128 x 64 pairs. shared: wavefronts of shared memory, copies into it included; ideal: without bank "
    "conflicts. tables: wavefronts of 128 bytes that are read through the first-level cache, 16 bytes a lane. copied, "
    "written: KiB of global memory by asynchronous copies and by stores of 16 bytes. Narrower accesses, as of row "
    "statistics and of sums over distances, are not counted. mma: products m16n8k16 of warps. shuffles: with ballots, "
    "of warps. sync_warp: of warps, sync_block: of blocks. instr/pair: instructions of the main loop for sm_90, of a "
    "warp and of 32 pairs. once: what a block does beyond that, whatever the number of its tiles."
)


class Launch(NamedTuple):
    kernel: str  # forward_kernel<Bfloat16, 64, false>
    grid: tuple[int, int]
    threads: int
    shared: int  # bytes
    arguments: bytes
    counts: Counter[str]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1]


class Emulator:
    """Runs the CUDA backend on the tests' emulator, for the rest of the process."""

    def __init__(self):
        sys.path.insert(1, str(compile_cuda.REPOSITORY / "tests/helpers"))
        import emulated

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            path = emulated.built("plain", pool)
        self._operators = emulated.load(path)
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_counts.restype = ctypes.c_char_p
        self._library.emulator_workspace_bytes.restype = ctypes.c_int64
        self._library.emulator_options(ctypes.c_uint64(1), False, True, -1)
        symbols = (line.split(" ", 2) for line in compile_cuda.run("nm", "-C", path).splitlines() if "_kernel" in line)
        self._names = {int(address, 16): compile_cuda.short_name(name) for address, _, name in symbols}

    def launches(self, run: Callable[[], object]) -> list[Launch]:
        """Returns what the kernels do that ``run`` launches, in their order."""
        self._library.emulator_clear_counts()
        run()
        found: list[Launch] = []
        for kind, *words in map(str.split, self._library.emulator_counts().decode().splitlines()):
            if kind == "launch":
                address, x, y, threads, shared = map(int, words[:5])
                known = self._names[address], (x, y), threads, shared, bytes.fromhex(words[5])
                found.append(Launch(*known, Counter()))
            else:
                found[-1].counts.update(_sorted(kind, *map(int, words[1:])))
        return found

    def workspace_bytes(self, batch: int, heads: int, length: int, backward: bool) -> int:
        table = slot_table(BUCKETS, LONGEST)
        shape = batch, heads, length, SIZE, None, table.far_past, table.far_future, table.rows
        return self._library.emulator_workspace_bytes(*shape, backward)


def _sorted(kind: str, requests: int, wavefronts: int, ideal: int, size: int) -> dict[str, int]:
    if kind in COLLECTIVES:
        return {kind: requests}
    if kind == "load_global":
        return {"tables": wavefronts, "read": size}
    if kind == "store_global":
        return {"written": size}
    return {
        kind.removesuffix("_transposed"): requests,
        "shared": wavefronts,
        "ideal": ideal,
        "read": size,
        "copied": size,
    }


def call(queries: int, keys: int, offset: int = 0, size: int = SIZE, heads: int = 1) -> tuple[Callable, Callable]:
    """Returns forward and backward of a small call as functions; backward needs forward's result."""

    def normal(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)

    inputs = [normal(1, heads, length, size) for length in (queries, keys, keys)]
    inputs += [normal(heads, ROWS, size) for _ in range(2)]
    options = dict(position_buckets=BUCKETS, max_relative_positions=LONGEST, query_offset=offset, backend="cuda")
    forward = lambda: disentangled_attention(*inputs, **options)
    return forward, lambda output: torch.autograd.grad(output, inputs, torch.zeros_like(output))


def launches_of_call(emulator: Emulator, *shape: int, **options: int) -> dict[str, list[Launch]]:
    forward, backward = call(*shape, **options)
    results: list = []
    return {
        "forward": emulator.launches(lambda: results.append(forward())),
        "backward": emulator.launches(lambda: backward(results[0])),
    }


class Tiles(NamedTuple):
    """Says what a kernel does for one unit of pairs."""

    kernel: str
    tiles: str  # near or far
    way: str  # forward or backward
    threads: int
    counts: dict[str, float]
    once: dict[str, float]  # for a block, whatever the number of its pairs


def per_unit(emulator: Emulator, size: int = SIZE) -> Iterator[Tiles]:
    """Counts each kernel that multiplies scores, per unit of near and of far pairs.

    A kernel does something once a block and something once a tile. Calls of several lengths tell these apart.
    """
    for tiles, offset in OFFSETS.items():
        calls = {
            (queries, keys): launches_of_call(emulator, queries, keys, offset, size=size)
            for queries in LENGTHS
            for keys in LENGTHS
        }
        for way in ("forward", "backward"):
            kernels = {x.kernel: x for x in calls[LENGTHS[0], LENGTHS[0]][way] if x.counts["multiply_add"]}
            for kernel, example in kernels.items():
                fitted = _fit(kernel, {lengths: launches[way] for lengths, launches in calls.items()})
                yield Tiles(kernel, tiles, way, example.threads, *fitted)


def _fit(kernel: str, calls: dict[tuple[int, int], list[Launch]]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns x and y of counts = x units + y blocks, by kind.

    backward_query has besides blocks of queries others, which own squares of pairs. Its y is for the former.

    Raises:
        RuntimeError: the counts are not of this form, so the numbers would say nothing.
    """
    used = {lengths: [x for x in launches if x.kernel == kernel] for lengths, launches in calls.items()}
    rows = [[queries * keys / UNIT, sum(x.blocks for x in own)] for (queries, keys), own in used.items()]
    several = [blocks - queries // 128 for (queries, _), (_, blocks) in zip(used, rows, strict=True)]
    if kernel.startswith("backward_query") and any(several):
        rows = [[units, blocks - others, others] for (units, blocks), others in zip(rows, several, strict=True)]
    known = torch.tensor(rows, dtype=torch.float64)
    kinds = sorted({kind for own in used.values() for x in own for kind in x.counts})
    per_unit, per_block = {}, {}
    for kind in kinds:
        counts = torch.tensor([[sum(x.counts[kind] for x in own)] for own in used.values()], dtype=torch.float64)
        found = torch.linalg.lstsq(known, counts).solution
        error = (known @ found - counts).abs().max().item()
        if error > 0.02 * counts.max().item():
            raise RuntimeError(f"{kernel}: {kind} is not linear in blocks and pairs, {counts.flatten().tolist()}")
        per_unit[kind], per_block[kind] = (round(x, 2) + 0.0 for x in found.flatten().tolist()[:2])
    return per_unit, per_block


def instructions(code: str, tiles: Tiles) -> float | None:
    """Returns instructions per 32 pairs of the loop that does the work of such tiles."""
    warps = tiles.threads / 32
    kinds = ("multiply_add", "copy_async", "load_matrices")
    for share in (0.25, 0.5, 1, 2):  # of a unit that an iteration processes
        work = sass.Work(*(share * tiles.counts.get(kind, 0) / warps for kind in kinds))
        if (found := sass.executed(code, work)) is not None:
            return found * warps * 32 / (share * UNIT)
    return None


def rows_of_tiles(counted: list[Tiles], code: dict[str, str]) -> list[dict]:
    rows = []
    for x in counted:
        n = Counter(x.counts)
        rows.append(
            {
                "kernel": _plain(x.kernel),
                "tiles": x.tiles,
                "shared": n["shared"],
                "ideal": n["ideal"],
                "tables": n["tables"],
                "copied": n["copied"] / 1024,
                "written": n["written"] / 1024,
                "mma": n["multiply_add"],
                "shuffles": n["shuffle_xor"] + n["shuffle"] + n["ballot"],
                "sync_warp": n["sync_warp"],
                "sync_block": n["sync_block"],
                "instr/pair": instructions(code[x.kernel], x) if code else None,
                "shared once": x.once.get("shared", 0.0),
                "tables once": x.once.get("tables", 0.0),
                "mma once": x.once.get("multiply_add", 0.0),
            }
        )
    return rows


def _plain(kernel: str) -> str:
    """Shortens to forward_kernel."""
    return kernel.partition("<")[0]


def passes_over_dscores(emulator: Emulator) -> dict[str, float]:
    """Returns how often near dA is written to and read from global memory, in units of its 2 bytes per pair.

    Its bytes are those that do not depend on the head size.
    """
    totals: dict[int, Counter] = {}
    for size in (32, 64):
        totals[size] = Counter()
        for x in per_unit(emulator, size):
            if (x.way, x.tiles) == ("backward", "near"):
                totals[size].update({kind: x.counts.get(kind, 0) for kind in ("read", "written")})
    return {kind: round((2 * totals[32][kind] - totals[64][kind]) / (2 * UNIT), 2) for kind in ("read", "written")}


def facts_of_calls(emulator: Emulator) -> dict[str, object]:
    """Counts launches, passes over dA and workspaces."""
    facts: dict[str, object] = {}
    for length in (128, 512, 2048, 8192):
        forward, backward = (
            emulator.workspace_bytes(16384 // length, 12, length, way) / 2**20 for way in (False, True)
        )
        facts[f"workspace at a length of {length}"] = f"{forward:.1f} MiB forward, {backward:.1f} MiB backward"
    whole = launches_of_call(emulator, 128, 128, heads=2)
    torch.ops.deberta_fast_emulated.limit_near_bytes(1)  # one head at a time, for the rest of the process
    parts = launches_of_call(emulator, 128, 128, heads=2)["backward"]
    group = len(parts) - len(whole["backward"])
    facts["launches"] = f"{len(whole['forward'])} forward, {len(whole['backward'])} backward, {group} more for"
    facts["launches"] += " each further group of heads"
    passes = passes_over_dscores(emulator)
    facts["near dA, 2 bytes a pair"] = f"written {passes['written']} times, read {passes['read']} times"
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the table and its provenance to DIR")
    parser.add_argument("--emulated", action="store_true", help="do without nvcc, so without instructions")
    parser.add_argument("--name", default="counts", help="of the file there (counts)")
    arguments = parser.parse_args()
    timing.provenance()
    emulator = Emulator()
    counted = list(per_unit(emulator))
    code, resources, notes = {}, [], LEGEND
    if not arguments.emulated:
        try:
            kernels = {x.name: x for x in compile_cuda.compile_all([CAPABILITY])}
        except FileNotFoundError as error:
            parser.error(f"{error}: --emulated does without")
        code = compile_cuda.machine_code(CAPABILITY)
        resources = [kernels[name] for name in dict.fromkeys(x.kernel for x in counted)]
        notes += f" nvcc: {compile_cuda.nvcc_version()}."
    rows = rows_of_tiles(counted, code)
    others = [
        {"kernel": _plain(x.name), "threads": x.threads, "registers": x.registers, "spill stores": x.spill_stores,
         "spill loads": x.spill_loads, "shared KiB": x.shared / 1024}
        for x in resources
    ]  # fmt: skip
    facts = "\n".join(f"- {name}: {value}" for name, value in facts_of_calls(emulator).items())
    table = f"{timing.markdown(others)}\n\n" if others else ""
    summary = f"{table}Calls with 16384 tokens and 12 heads, without a mask:\n\n{facts}"
    if arguments.out:
        timing.save(arguments.name, rows, arguments.out, notes, summary)
    print(f"{timing.markdown(rows)}\n\n{summary}\n\n{notes}")


if __name__ == "__main__":
    main()
