"""Finds the main loops of a kernel in its machine code, and counts their instructions.

A loop is what lies between the target of a backward branch and the branch. The compiler moves rare code to the end of
a function, so a loop includes what follows from there only if it lies in between.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")


class Loop(NamedTuple):
    """A main loop, which multiplies on tensor cores, and perhaps one loop in it that does so too.

    Attributes:
        mma, instructions: of the main loop without the inner one.
        inner_mma, inner_instructions: of the inner one.
    """

    mma: int
    instructions: int
    inner_mma: int = 0
    inner_instructions: int = 0

    def executed(self, products: float) -> float:
        """Returns the instructions of an iteration that executes so many products.

        The inner loop runs as often as that takes. So a branch around some products, which the first iteration alone
        takes, counts as a part of an iteration of the inner loop that costs about the same.
        """
        if self.inner_mma == 0:
            return float(self.instructions)
        return self.instructions + self.inner_instructions * (products - self.mma) / self.inner_mma


def main_loops(code: str) -> list[Loop]:
    """Returns the main loops of a function as cuobjdump disassembles it, in the order of the code."""
    lines = [(int(address, 16), opcode, rest) for address, opcode, rest in _LINE.findall(code) if opcode != "NOP"]
    ends: dict[int, int] = {}  # by the beginning of the loop
    for address, opcode, rest in lines:
        target = _TARGET.search(rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:  # a branch to itself ends a function
            start = int(target[1], 16)
            ends[start] = max(ends.get(start, 0), address)
    products = [address for address, opcode, _ in lines if opcode.partition(".")[0].endswith("MMA")]
    inside = lambda span: [address for address in products if span[0] <= address <= span[1]]
    spans = sorted((span for span in ends.items() if inside(span)), key=lambda span: (span[0], -span[1]))
    return [_describe(span, child, lines, products) for span, child in _mains(spans, inside)]


def _mains(spans: list[tuple[int, int]], inside) -> list[tuple[tuple[int, int], tuple[int, int] | None]]:
    """Chooses the main loops among nested ones, and the inner loop of each.

    A loop that multiplies nothing itself only repeats the loops in it, which are the main ones. But if there is one
    in it and none in that, then that is the inner loop of this one.
    """
    found = []
    while spans:
        span, rest = spans[0], spans[1:]
        within = [other for other in rest if other[1] <= span[1]]
        spans = [other for other in rest if other[1] > span[1]]
        children = [x for x in within if not any(y != x and y[0] <= x[0] and x[1] <= y[1] for y in within)]
        own = len(inside(span)) - sum(len(inside(child)) for child in children)
        if not children:
            found.append((span, None))
        elif len(children) == 1 and (own > 0 or len(within) == 1):
            found.append((span, children[0]))
        elif own == 0:
            found += _mains(within, inside)
        else:
            found.append((span, None))
    return found


def _describe(span, child, lines, products) -> Loop:
    count = lambda addresses, part: sum(part[0] <= address <= part[1] for address in addresses)
    addresses = [address for address, *_ in lines]
    mma, instructions = count(products, span), count(addresses, span)
    if child is None:
        return Loop(mma, instructions)
    inner = count(products, child), count(addresses, child)
    return Loop(mma - inner[0], instructions - inner[1], *inner)
