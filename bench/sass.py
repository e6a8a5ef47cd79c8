"""Counts the instructions that a warp executes in an iteration of a kernel's main loop, from its machine code.

Loops are recognised by what they do: an iteration is the shortest way from the beginning of a loop back to it that has
as many products, copies and loads of matrices as the emulator counted. So code for masks and ragged ends, and the
rescaling that few tiles need, do not count.
"""

import heapq
import re
from collections.abc import Iterator
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"(.*)\b0x([0-9a-f]+)\s*$")


class Work(NamedTuple):
    """Identifies a loop by the instructions that a warp executes in it."""

    products: float  # on tensor cores
    copies: float  # asynchronous ones, of 16 bytes a lane
    matrices: float  # loads of four matrices


Counts = tuple[int, int, int, int]  # products, products under a condition, copies, loads of matrices


class Block(NamedTuple):
    instructions: int
    work: Counts
    follow: tuple[int, ...]  # addresses of the blocks that may come next


def blocks(code: str) -> dict[int, Block]:
    """Returns the basic blocks of a function, as cuobjdump disassembles it, by their first address."""
    lines = [(int(at, 16), guard, opcode, rest) for at, guard, opcode, rest in _LINE.findall(code)]
    targets, ends = {}, set()
    for at, guard, opcode, rest in lines:
        name = opcode.partition(".")[0]
        if name == "BRA" and (found := _TARGET.match(rest)):
            targets[at] = int(found[2], 16)
            guard = guard or found[1].strip()  # a uniform branch has its condition among the operands
        if name in ("BRA", "EXIT", "RET") and not guard:
            ends.add(at)
    starts = {lines[0][0], *targets.values()}
    starts |= {after[0] for line, after in zip(lines, lines[1:]) if line[0] in targets or line[0] in ends}
    found: dict[int, Block] = {}
    first, count, work = lines[0][0], 0, [0, 0, 0, 0]
    for (at, guard, opcode, _), after in zip(lines, [*lines[1:], None]):
        name = opcode.partition(".")[0]
        count += name != "NOP"
        product = name.endswith("MMA")
        for i, does in enumerate((product and not guard, product and guard, name == "LDGSTS", name == "LDSM")):
            work[i] += bool(does)
        if after is None or after[0] in starts:
            follow = [targets[at]] if at in targets else []
            follow += [after[0]] if after is not None and at not in ends else []
            found[first] = Block(count, tuple(work), tuple(follow))
            first, count, work = after[0] if after else 0, 0, [0, 0, 0, 0]
    return found


def iterations(code: dict[int, Block], start: int, most: Counts) -> dict[Counts, int]:
    """Returns the fewest instructions from ``start`` back to it, by the work on the way, which is at most ``most``."""
    found: dict[Counts, int] = {}
    seen, queue = set(), [(0, start, (0, 0, 0, 0))]
    while queue:
        cost, at, done = heapq.heappop(queue)
        if at == start and cost > 0:
            found.setdefault(done, cost)
            continue
        if (at, done) in seen:
            continue
        seen.add((at, done))
        block = code[at]
        new = tuple(x + y for x, y in zip(done, block.work))
        if all(x <= y for x, y in zip(new, most)):
            for after in block.follow:
                if (after, new) not in seen:
                    heapq.heappush(queue, (cost + block.instructions, after, new))
    return found


def executed(code: str, work: Work) -> float | None:
    """Returns the instructions of an iteration that does this work, or None if there is no such loop.

    Warps that share work unevenly do a little more or less of it, so products are interpolated, and loads of matrices
    may differ by a tenth.
    """
    function = blocks(code)
    heads = {after for at, block in function.items() for after in block.follow if after <= at}
    most = int(1.3 * work.products), int(2 * work.products), int(work.copies), int(1.4 * work.matrices)
    costs = [
        cost
        for head in sorted(heads)
        if (cost := _interpolated(dict(_fitting(iterations(function, head, most), work)), work.products)) is not None
    ]
    return min(costs, default=None)


def _fitting(found: dict[Counts, int], work: Work) -> Iterator[tuple[float, int]]:
    """Yields (products, instructions) of the iterations with the right copies and loads, cheapest last."""
    for (products, perhaps, copies, matrices), cost in sorted(found.items(), key=lambda item: -item[1]):
        done = min(max(products, work.products), products + perhaps)
        expected = work.matrices * done / work.products
        if copies == work.copies and abs(matrices - expected) <= 0.1 * expected:
            yield done, cost


def _interpolated(costs: dict[float, int], products: float) -> float | None:
    below = max((n for n in costs if n <= products), default=None)
    above = min((n for n in costs if n >= products), default=None)
    if below is None or above is None:
        return None
    if below == above:
        return float(costs[below])
    return costs[below] + (costs[above] - costs[below]) * (products - below) / (above - below)
