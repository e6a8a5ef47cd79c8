"""Loops of a disassembled kernel: where each comes from in the source, what it is made of, and what of it is executed.

Works on what comes with Triton: ``nvdisasm`` names the line of the PTX that an instruction belongs to, and Triton's PTX
says for every line which Python lines it stems from, through all the device functions that were inlined. What nvcc
compiled with ``-lineinfo`` tells the same of the CUDA source at once.
"""

import ast
import inspect
import re
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median_low
from typing import NamedTuple

try:
    from triton import JITFunction
except ModuleNotFoundError:  # CUDA kernels do without
    JITFunction = None

_LABEL = re.compile(r"([.$\w]+):")
_SOURCE_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
_PTX = ".nv_debug_ptx_txt"
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"([^`]*)`\((\.L\w+)\)")
_FRAME = re.compile(r"([^\s@\[]+):(\d+):\d+")

_NARROW = {"U8", "S8", "U16", "S16"}
_ASYNC_COPIES = {"LDGSTS", "UBLKCP", "UTMALDG"}
_WAITS = {"SYNCS", "NANOSLEEP", "UTCATOMSWS"}
_WORK = {"FADD", "FMUL", "FFMA", "MUFU", "LDG", "LDS", "LDTM", "STG", "STS", *_ASYNC_COPIES}
_COPIED_ONCE = {"MUFU", "HMMA", "LDG", "LDGSTS", "STG"}  # one PTX instruction gives one of these


class Instruction(NamedTuple):
    opcode: str  # with its modifiers, LDG.E.U16
    target: str | None  # the label that it may jump to
    falls_through: bool
    frames: tuple[tuple[str, int], ...]  # lines that it comes from, as (file, line): the innermost inlined one first

    @property
    def ptx_line(self) -> int | None:
        return next((line for file, line in self.frames if file == _PTX), None)

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_mma(self) -> bool:
        return self.name.endswith("MMA")  # HMMA, HGMMA, UTCHMMA, ...


class Loop(NamedTuple):
    """An innermost loop. Counts are static: those of one warp in one pass through the machine code's body.

    Code under a condition counts in full, so the instructions are an upper bound where a loop has some.
    """

    function: str  # the jit function with the ``for``
    line: int  # of that ``for``
    kernel_line: int  # of the kernel, from where the loop was reached: tells calls of one function apart
    instructions: int
    unrolled: int  # iterations of the source's loop in one of the machine code's: ptxas unrolls short ones
    mma: int
    global_loads: int
    narrow_loads: int  # those of one or two bytes: what a gather of single elements becomes
    async_copies: int
    shared_loads: int
    shared_stores: int
    global_stores: int
    spills: int
    barriers: int

    def per_score(self, rows: int, columns: int, warps: int) -> float:
        """Instructions of all threads for each score of a tile, if an iteration makes one tile."""
        return self.instructions * warps * 32 / (self.unrolled * rows * columns)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of ``nvdisasm -c``, with -gp or -gi, and the index of the one that follows each label."""
    instructions, labels, frames, complete = [], {}, (), True
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            guard, opcode, operands = match.groups()
            name = opcode.partition(".")[0]
            # A call of a label inside the function is a jump too: so ptxas leaves some loops on sm_80.
            jump = _TARGET.match(operands) if name in ("BRA", "JMP", "CALL") else None
            # A uniform branch has its condition among the operands.
            always = not guard and not (jump and jump[1].strip())
            ends = always and (jump or name in ("BRA", "JMP", "BRX", "EXIT", "RET"))
            instructions.append(Instruction(opcode, jump and jump[2], not ends, frames))
            complete = True
        elif match := _SOURCE_LINE.match(line):
            frame = (match[1].rpartition("/")[2], int(match[2]))
            frames, complete = (frame,) if complete else (*frames, frame), False
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
    return instructions, labels


def innermost_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Indices of each innermost loop's instructions.

    Natural loops, not just the code between a label and the branch back to it: what ptxas moves out of line belongs to
    them. Loops that only wait for a barrier are part of the instruction that waits and are left out, also of the loops
    around them.
    """
    natural = _natural_loops(*_blocks(instructions, labels))
    waits = {name for name in natural if _is_wait([instructions[i] for i in natural[name]])}
    waiting = {i for name in waits for i in natural[name]}
    loops = {name: body for name, body in natural.items() if name not in waits}
    innermost = (a for a in loops.values() if not any(b < a for b in loops.values()))
    return sorted(sorted(body - waiting) for body in innermost)


def _is_wait(body: list[Instruction]) -> bool:
    return any(i.name in _WAITS for i in body) and not any(i.is_mma or i.name in _WORK for i in body)


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Basic blocks, as first index -> end, and the blocks that may follow each one."""
    starts = {0, *labels.values(), *(i + 1 for i, x in enumerate(instructions) if x.target or not x.falls_through)}
    starts = sorted(start for start in starts if start < len(instructions))
    ends = dict(zip(starts, [*starts[1:], len(instructions)]))
    follow = {}
    for start, end in ends.items():
        last = instructions[end - 1]
        targets = [labels.get(last.target)] if last.target else []
        follow[start] = [i for i in [*targets, *([end] if last.falls_through else [])] if i in ends]
    return ends, follow


class Flow(NamedTuple):
    """A kernel as basic blocks, named by the index of their first instruction, and its natural loops by their heads."""

    instructions: list[Instruction]
    ends: dict[int, int]
    follow: dict[int, list[int]]
    loops: dict[int, set[int]]  # indices of instructions

    @classmethod
    def of(cls, instructions: list[Instruction], labels: dict[str, int]) -> "Flow":
        ends, follow = _blocks(instructions, labels)
        return cls(instructions, ends, follow, _natural_loops(ends, follow))

    def inside(self, head: int) -> list[int]:
        """Heads of the loops directly inside one."""
        within = [h for h, body in self.loops.items() if body < self.loops[head]]
        return [h for h in within if not any(self.loops[h] < self.loops[other] for other in within)]

    def iteration(
        self, head: int, rare: Callable[[Instruction], bool], trips: Callable[[int], float]
    ) -> dict[int, float]:
        """How often each instruction is executed by a warp in a common iteration of a loop.

        It is the path from the loop's head back to it that has the most instructions, where those of blocks that are
        ``rare`` for the most part count against it: of two branches the longer one is taken, and a rare one only if
        there is no other. A loop inside is passed ``trips(its head)`` times in the same way.
        """
        loop = self.loops[head]
        inner = {h: self.iteration(h, rare, trips) for h in self.inside(head)}
        owner = {i: h for h in inner for i in self.loops[h] if i in self.ends}

        def value(start: int) -> float:
            block = [i for i in self.instructions[start : self.ends[start]] if i.name != "NOP"]
            return -len(block) if 2 * sum(map(rare, block)) > len(block) else len(block)

        def own(start: int) -> dict[int, float]:
            if start in inner:
                passes = trips(start)
                return {i: passes * n for i, n in inner[start].items()}
            return {i: 1 for i in range(start, self.ends[start]) if self.instructions[i].name != "NOP"}

        def worth(start: int) -> float:
            if start in inner:
                return trips(start) * sum(value(i) for i in inner[start] if i in self.ends)
            return value(start)

        def after(start: int) -> set[int]:
            """Blocks and loops inside that follow; ``head`` among them ends the iteration."""
            parts = [i for i in self.loops[start] if i in self.ends] if start in inner else [start]
            return {owner.get(b, b) for part in parts for b in self.follow[part] if b in loop} - {start}

        best: dict[int, tuple[float, int]] = {}  # from there to the end, and what to go on with
        seen, stack = set(), [(head, False)]
        while stack:
            start, done = stack.pop()
            if done:
                ways = [(0 if b == head else best[b][0], b) for b in after(start) if b == head or b in best]
                if start == head and head in self.follow[start]:
                    ways.append((0, head))
                if ways:
                    most, way = max(ways)
                    best[start] = worth(start) + most, way
            elif start not in seen:
                seen.add(start)
                stack += [(start, True), *((b, False) for b in after(start) - {head})]
        times, at = own(head), best[head][1]
        while at != head:
            times |= own(at)
            at = best[at][1]
        return times


def _natural_loops(ends: dict[int, int], follow: dict[int, list[int]]) -> dict[int, set[int]]:
    before: dict[int, set[int]] = {start: set() for start in ends}
    reached, queue = {0}, [0]
    while queue:
        start = queue.pop()
        for after in follow[start]:
            before[after].add(start)
            if after not in reached:
                reached.add(after)
                queue.append(after)
    dominators = {start: {0} if start == 0 else set(reached) for start in reached}
    changed = True
    while changed:
        changed = False
        for start in sorted(reached - {0}):
            new = {start} | set.intersection(*(dominators[b] for b in before[start]))
            changed |= new != dominators[start]
            dominators[start] = new
    loops: dict[int, set[int]] = {}
    for latch in reached:
        for head in set(follow[latch]) & dominators[latch]:
            body, queue = {head}, [latch]
            while queue:
                if (block := queue.pop()) not in body:
                    body.add(block)
                    queue.extend(before[block])
            loops.setdefault(head, set()).update(i for block in body for i in range(block, ends[block]))
    return loops


def describe(body: list[Instruction], sources: "Sources") -> Loop:
    names = Counter(i.name for i in body)
    loads = [i for i in body if i.name == "LDG"]
    return Loop(
        *sources.loop(i.ptx_line for i in body),
        instructions=len(body) - names["NOP"],
        unrolled=_unrolled(body),
        mma=sum(i.is_mma for i in body),
        global_loads=len(loads),
        narrow_loads=sum(bool(_NARROW & set(i.opcode.split("."))) for i in loads),
        async_copies=sum(names[name] for name in _ASYNC_COPIES),
        shared_loads=names["LDS"] + names["LDSM"],
        shared_stores=names["STS"] + names["STSM"],
        global_stores=names["STG"] + names["RED"] + names["ATOMG"],
        spills=names["LDL"] + names["STL"],
        barriers=names["BAR"],
    )


def _unrolled(body: list[Instruction]) -> int:
    copies = Counter((i.ptx_line, i.name) for i in body if i.name in _COPIED_ONCE)
    return median_low(copies.values()) if copies else 1


class Sources:
    """Finds the ``for`` statement of the source that a line of PTX belongs to."""

    def __init__(self, kernel: JITFunction, others: Iterable[object], ptx: str):
        functions = _reachable([kernel, *others])
        self.kernel = kernel
        self.kernel_lines = _lines(kernel)
        self.statements = [statement for function in functions for statement in _for_statements(function)]
        self.frames = list(_frames(ptx))

    def loop(self, ptx_lines: Iterable[int | None]) -> tuple[str, int, int]:
        """Function and line of the ``for`` that most instructions come from, and the line of the kernel."""
        votes: Counter = Counter()
        for ptx_line in ptx_lines:
            if ptx_line is not None and ptx_line <= len(self.frames):
                votes.update(self._statement(self.frames[ptx_line - 1]))
        if votes:
            return votes.most_common(1)[0][0]
        return self.kernel.__name__, self.kernel_lines.start, self.kernel_lines.start

    def _statement(self, frames: list[tuple[str, int]]) -> Iterator[tuple[str, int, int]]:
        # The innermost function that was inlined comes first, the kernel last.
        for file, line in frames:
            around = [s for s in self.statements if s.file == file and line in s.lines]
            if around:
                statement = max(around, key=lambda s: s.lines.start)
                last_line = frames[-1][1]
                in_kernel = statement.function == self.kernel.__name__
                yield statement.function, statement.lines.start, statement.lines.start if in_kernel else last_line
                return


class _For(NamedTuple):
    function: str
    file: str
    lines: range


def _frames(ptx: str) -> Iterator[list[tuple[str, int]]]:
    """For every line of the PTX the (file, line) that it comes from, and from where that was inlined, and so on."""
    frames: list[tuple[str, int]] = []
    for line in ptx.splitlines():
        if line.lstrip().startswith(".loc"):
            found = _FRAME.findall(line.partition("//")[2])
            frames = [(Path(file).name, int(number)) for file, number in found if number != "0"]
        yield frames


def _for_statements(function: JITFunction) -> Iterator[_For]:
    lines, start = inspect.getsourcelines(function.fn)
    file = Path(inspect.getsourcefile(function.fn)).name
    for node in ast.walk(ast.parse(textwrap.dedent("".join(lines)))):
        # Triton unrolls a static_range: no loop is left of it.
        unrolls = isinstance(node, ast.For) and "static_range" in ast.unparse(node.iter)
        if isinstance(node, ast.For | ast.While) and not unrolls:
            yield _For(function.__name__, file, range(node.lineno + start - 1, node.end_lineno + start))


def _lines(function: JITFunction) -> range:
    lines, start = inspect.getsourcelines(function.fn)
    return range(start, start + len(lines))


def _reachable(values: Iterable[object]) -> list[JITFunction]:
    """The jit functions among ``values`` and those that they call, Triton's own left out."""
    found: dict[int, JITFunction] = {}
    queue = list(values)
    while queue:
        value = queue.pop()
        if not isinstance(value, JITFunction) or id(value) in found or value.__module__.startswith("triton."):
            continue
        found[id(value)] = value
        names = value.fn.__code__.co_names
        used = [value.fn.__globals__[name] for name in names if name in value.fn.__globals__]
        modules = [x for x in used if isinstance(x, types.ModuleType)]
        queue += used + [getattr(module, name) for module in modules for name in names if hasattr(module, name)]
    return list(found.values())
