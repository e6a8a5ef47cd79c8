"""The launches that compute a call: their grids, numbers and workspace.

A plan is made from the forms of tensors. It says what would be compiled for a call, and serves every call of its forms.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ...call import TENSORS, Call
from ...dropout import threshold_and_scale
from .configuration import Configuration, Tiles
from .kernels.backward_key import backward_key
from .kernels.backward_query import backward_query
from .kernels.bands import backward_by_distance, backward_by_row, backward_rows, band_scores
from .kernels.forward import forward
from .kernels.prepare import prepare
from .launch import ALLOCATED, GIVEN, Form, Launch, Tensors, Workspace, form_of, new_launch

LOG2E = 1 / math.log(2)
SHARES = 2  # partial sums per residue of rows in the gradients of the tables; docs/measured.md says what is known
WORKSPACE_ALIGN = 128  # rows; every alignment divides it
SMALL = Tiles(0, 0, 4, 1)  # warps and stages of kernels that take little time
KEPT = 128  # plans


class Limits(NamedTuple):
    """The sizes of parts: near scores take at most ``band_bytes``, unless there would be fewer ``rows`` of queries."""

    band_bytes: int = 32 << 20
    rows: int = 1 << 14  # two programs of 64 rows for each of an H200's 132 multiprocessors


_limits = Limits()


def limit_band_bytes(count: int = Limits().band_bytes, rows: int = Limits().rows) -> None:
    """Sets how many bytes of near scores are held at once, for the rest of the process; restores without arguments.

    A call is computed in parts of as many heads, or batch rows of one head, as fit. With the usual limit, bands stay in
    the second-level cache of an H100 or H200, of 50 MB, between the kernels that write and read them. Parts of fewer
    ``rows`` of queries would leave multiprocessors idle, so the parts of long sequences exceed the limit.
    """
    global _limits
    _limits = Limits(count, rows)


class Settings(NamedTuple):
    """What a plan depends on besides the call."""

    configuration: Configuration
    precision: str
    limits: Limits
    shares: int
    step_of: Callable[[int], int]


def settings(configuration: Configuration, precision: str) -> Settings:
    return Settings(configuration, precision, _limits, SHARES, step_of)


class Part(NamedTuple):
    """The heads and batch rows whose bands are held at the same time."""

    first_head: int
    heads: int
    first_batch: int
    batches: int


class Plan:
    """The launches of one class of calls. ``values`` has the numbers of all kernels by name.

    It knows of a call only its arguments here. ``plan_of`` keeps plans by these, so that a plan that is found is right.

    Args:
        forms: those of the tensors GIVEN. Forward has none from grad_output on.
        others: the fields of the call that are not tensors.
    """

    def __init__(self, forms: tuple, others: tuple, settings: Settings):
        self.forms = {name: x and Form(*x) for name, x in zip(GIVEN, forms, strict=True)}
        self.call = call = Call(*list(self.forms.values())[:TENSORS], *others)
        self.settings, self.configuration = settings, settings.configuration
        self.backward = self.forms["grad_output"] is not None
        self.workspaces: dict[str, Workspace] = {}
        batch, heads, query_rows, size = call.query.shape
        self.packed = call.cu_seqlens is not None
        self.batches = call.cu_seqlens.shape[0] - 1 if self.packed else batch
        self.query_length, self.key_length = query_rows, call.key.shape[2]
        if self.packed:
            self.query_length = self.key_length = call.max_seqlen
        mask, self.mask_kind = call.mask, "none"
        if mask is not None:
            self.mask_kind = "keys" if mask.shape[1] == mask.shape[2] == 1 else "pairs"
        self.c2p, self.p2c = call.pos_key is not None, call.pos_query is not None
        itemsize = call.query.dtype.itemsize
        aligned = all(stride * itemsize % 16 == 0 for x in call[:3] for stride in _strides(x)[:3])
        self.unit = 16 // itemsize if aligned else 1
        self.step = settings.step_of(max(self.query_length, self.key_length))
        mask_b, mask_h, mask_i, mask_j = (0, 0, 0, 0) if mask is None else _strides(mask)
        threshold, inverse_keep = threshold_and_scale(call.dropout_p)
        self.values = {
            "mask_b": 0 if self.packed else mask_b, "mask_h": mask_h, "mask_i": mask_i, "mask_j": mask_j,
            "c2p_b": 0, "c2p_h": 0, "c2p_pitch": 0, "p2c_b": 0, "p2c_h": 0, "p2c_pitch": 0,
            "query_length": self.query_length, "key_length": self.key_length, "offset": call.query_offset,
            **dict.fromkeys(("do_b", "do_h", "do_l", "dlse_b", "dlse_h", "dlse_l", "delta_b", "delta_h"), 0),
            "first_distance": 0, "distances": 0, "far_past": 0, "far_future": 0, "past_slot": 0, "future_slot": 0,
            "heads": heads, "scale": call.scale * LOG2E, "softmax_scale": call.scale,
            "band_scale": call.band_scale, "inverse_band_scale": 1 / call.band_scale,
            "threshold": threshold, "inverse_keep": inverse_keep,
            "HEAD_DIM": size, "BLOCK_D": block_d_of(call), "UNIT": self.unit,
            "LARGEST": torch.finfo(call.query.dtype).max, "PRECISION": settings.precision, "PACKED": self.packed,
            "SPANS": False, "MASK": self.mask_kind, "DROPOUT": call.dropout_p > 0,
            "ORIGIN": call.seed is not None and call.seed.shape[0] > 1,
            "C2P": self.c2p, "P2C": self.p2c, "ALIGN": self.configuration.alignment,
        }  # fmt: skip
        for name, x in zip("qkv", call[:3], strict=True):
            self._add_strides(name, x, self.unit)
        for name, table in (("pos_key", call.pos_key), ("pos_query", call.pos_query)):
            stride_h, stride_l, _ = (0, 0, 0) if table is None else table.strides
            self.values |= {f"{name}_h": stride_h, f"{name}_l": stride_l}
        if call.has_positions:
            self._add_geometry()
        self._add_strides("o", self.forms["output"], self.unit)
        lse_b, lse_h, _ = self.forms["lse"].strides
        self.values |= {"lse_b": 0 if self.packed else lse_b, "lse_h": lse_h}
        launches = self._backward() if self.backward else self._forward()
        self.launches = [launch for launch in launches if 0 not in launch.grid]

    def tensors(self, given: Tensors) -> list[torch.Tensor | None]:
        """Allocates the workspace and returns all tensors."""
        query, made = given[0], self.workspaces
        return [*given, *(made[name].allocate(query) if name in made else None for name in ALLOCATED)]

    def _forward(self) -> Iterator[Launch]:
        yield self._prepare()
        yield from self._part_by_part(self._forward_part)

    def _backward(self) -> Iterator[Launch]:
        for name, tensor in (("do", "output"), ("dq", "query"), ("dk", "key"), ("dv", "value")):
            self._add_strides(name, self.forms[f"grad_{tensor}"], self.unit)
        self._add_strides("dlse", self.forms["grad_lse"], 1)
        yield self._prepare()
        wanted = {"C2P": self.forms["grad_pos_key"] is not None, "P2C": self.forms["grad_pos_query"] is not None}
        self._add_table_sums(wanted)
        yield from self._part_by_part(lambda part: self._backward_part(part, wanted))
        if any(wanted.values()):
            yield self._by_row(wanted)

    def _part_by_part(self, launches: Callable[[Part], Iterator[Launch]]) -> Iterator[Launch]:
        known: dict[tuple[int, int], list[Launch]] = {}
        for part in self._parts():
            size = part.heads, part.batches
            if size not in known:
                known[size] = list(launches(part))
            yield from (_for_part(launch, part) for launch in known[size])

    def _forward_part(self, part: Part) -> Iterator[Launch]:
        yield from self._band_scores(part)
        yield self._blocks(forward, self.query_length, part, "BLOCK_M", "BLOCK_N")

    def _backward_part(self, part: Part, wanted: dict[str, bool]) -> Iterator[Launch]:
        yield from self._band_scores(part)
        yield self._blocks(backward_key, self.key_length, part, "BLOCK_N", "BLOCK_M")
        yield self._blocks(backward_query, self.query_length, part, "BLOCK_M", "BLOCK_N")
        if self.call.has_positions:
            yield self._band_blocks(backward_rows, part)
        if any(wanted.values()):
            yield self._by_distance(part, wanted)

    def _add_strides(self, name: str, form: Form, unit: int) -> None:
        """Adds strides in units. Packed sequences share one batch row, so theirs is 0."""
        b, h, l, *_ = _strides(form)
        self.values |= {f"{name}_b": 0 if self.packed else b // unit, f"{name}_h": h // unit, f"{name}_l": l // unit}

    def _add_geometry(self) -> None:
        call, table, align = self.call, self.call.table, self.configuration.alignment
        past, future, offset = table.far_past, table.far_future, call.query_offset
        queries, keys = (_round_up(n, align) for n in (self.query_length, self.key_length))
        widest = (past - future + 3 * align - 4) // align * align
        # The distances i - j of all pairs in near tiles.
        first = max(future - 2 * align, offset - keys) + 1
        stop = min(past + 2 * align, offset + queries) + 1
        self.distances = max(stop - first, 1)
        self.values |= {
            "far_past": past, "far_future": future, "past_slot": call.past_row, "future_slot": call.future_row,
            "first_distance": first, "distances": self.distances,
            "c2p_pitch": max(min(widest, keys), align) // 16, "p2c_pitch": max(min(widest, queries), align) // 16,
        }  # fmt: skip

    def _parts(self) -> list[Part]:
        call, batches = self.call, self.batches
        heads = call.query.shape[1]
        if not call.has_positions:
            return [Part(0, heads, 0, batches)]
        rows = self._workspace_rows(self.query_length) * self.values["c2p_pitch"]
        rows += self._workspace_rows(self.key_length) * self.values["p2c_pitch"]
        head_bytes = max(1, rows * 16 * call.query.dtype.itemsize * (1 if self.packed else batches))
        most, fewest_rows = self.settings.limits
        query_rows = call.query.shape[2]
        whole = -(-fewest_rows // max(1, query_rows * (1 if self.packed else batches)))
        heads_at_once = min(heads, max(1, most // head_bytes, whole))
        batches_at_once = batches
        if head_bytes > most and not self.packed:
            batches_at_once = min(batches, max(1, most * batches // head_bytes, -(-fewest_rows // max(1, query_rows))))
        return [
            Part(h, n, b, m) for h, n in _shares(heads, heads_at_once) for b, m in _shares(batches, batches_at_once)
        ]

    def _prepare(self) -> Launch:
        """Returns the launch for tables by distance, key spans of a padding mask, and backward's vectors, if any."""
        call, heads = self.call, self.call.query.shape[1]
        table_rows = min(32, 2048 // block_d_of(call))
        distance_blocks = -(-self.distances // table_rows) if call.has_positions else 0
        rows = reach = blocks = 0
        if call.has_positions:
            rows, reach = (call.pos_key or call.pos_query).shape[1], self.forms["slots"].shape[0] // 2
        for name, table in (("key_table", call.pos_key), ("query_table", call.pos_query)):
            if table is not None:
                self.workspaces[name] = Workspace((heads, self.distances, table.shape[2]), table.dtype)
        self.values["SPANS"] = self.mask_kind == "keys" and not self.packed
        if self.values["SPANS"]:
            self.workspaces["key_spans"] = Workspace((self.batches, 4), torch.int32)
        if self.backward:
            self._add_vectors()
            blocks = -(-self.query_length // WORKSPACE_ALIGN)
        programs = distance_blocks * (self.c2p + self.p2c) + self.batches * self.values["SPANS"] + blocks * self.batches
        return self._launch(
            prepare, (programs, heads, 1), SMALL, None, reach=reach, first_slot=call.first_slot, rows=rows,
            distance_blocks=distance_blocks, batches=self.batches, blocks=blocks, BACKWARD=self.backward,
            BLOCK_E=table_rows, BLOCK_N=1024, BLOCK_M=WORKSPACE_ALIGN,
        )  # fmt: skip

    def _band_scores(self, part: Part) -> Iterator[Launch]:
        """Adds the bands of the first, largest part, and yields the launch that writes the scores of a part."""
        if not self.call.has_positions:
            return
        dtype, size = self.call.query.dtype, self.call.query.shape[3]
        wanted = {"c2p": self.c2p, "p2c": self.p2c or self.backward}  # backward passes dA on in the p2c band
        for name in (name for name, want in wanted.items() if want):
            rows = self._workspace_rows(self.query_length if name == "c2p" else self.key_length)
            count = part.heads * rows * (1 if self.packed else part.batches)
            self.workspaces.setdefault(name, Workspace((count, self.values[f"{name}_pitch"] * 16), dtype))
            if self.backward:
                partial = "partial_query" if name == "c2p" else "partial_key"
                self.workspaces.setdefault(partial, Workspace((count, size), torch.float32))
            self.values |= {f"{name}_b": 0 if self.packed else part.heads * rows, f"{name}_h": rows}
        yield self._band_blocks(band_scores, part)

    def _workspace_rows(self, length: int) -> int:
        """Returns the rows of the workspace per batch row and head, or per head of all packed sequences."""
        if self.packed:
            return (self.call.query.shape[2] // WORKSPACE_ALIGN + self.batches + 1) * WORKSPACE_ALIGN
        return _round_up(length, WORKSPACE_ALIGN)

    def _add_vectors(self) -> None:
        """Adds backward's vectors with one number per query."""
        heads, rows = self.call.query.shape[1], self._workspace_rows(self.query_length)
        count = heads * rows * (1 if self.packed else self.batches)
        self.workspaces |= dict.fromkeys(("delta", "lse_log2"), Workspace((count,), torch.float32))
        self.values |= {"delta_b": 0 if self.packed else heads * rows // 16, "delta_h": rows // 16}

    def _add_table_sums(self, wanted: dict[str, bool]) -> None:
        """Adds the sums by distance, one per split, and the far sums, one per key block."""
        query = self.call.query
        heads, size = query.shape[1], query.shape[3]
        rows = self.configuration.backward_key.rows
        count = self.batches * -(-self.key_length // rows)
        if self.packed:
            count = query.shape[2] // rows + self.batches + 1
        self.values["far_count"] = count
        empty = not self.batches  # no kernel writes them
        for name, present, want in (("pos_key", self.c2p, wanted["C2P"]), ("pos_query", self.p2c, wanted["P2C"])):
            if present:  # backward_key fills them even if the table's gradient is not wanted
                self.workspaces[f"far_{name}"] = Workspace(
                    (heads, 2, count, size), torch.float32, zero=self.packed or empty
                )
            if want:
                shape = (self.step * self.settings.shares, heads, self.distances, size)
                self.workspaces[f"sums_{name}"] = Workspace(shape, torch.float32, zero=empty)

    def _blocks(self, kernel, length: int, part: Part, own: str, other: str) -> Launch:
        """Returns a launch with one program per block of rows, batch row and head of a part."""
        name = kernel.__name__
        tiles = getattr(self.configuration, name)
        blocks = -(-length // tiles.rows)
        return self._launch(
            kernel, (blocks * part.batches, part.heads, 1), tiles, name, blocks=blocks, first_batch=part.first_batch,
            first_head=part.first_head, **{own: tiles.rows, other: tiles.columns},
        )  # fmt: skip

    def _band_blocks(self, kernel, part: Part) -> Launch:
        """Returns a launch with one program per term and block of rows of its band, which are ``step`` apart."""
        tiles, step = self.configuration.bands, self.step
        # Up to a multiple of the alignment: every cell that a near tile reads must be finite.
        rows = _round_up(max(self.query_length * self.c2p, self.key_length * self.p2c), self.configuration.alignment)
        blocks = -(-rows // (tiles.rows * step)) * step
        return self._launch(
            kernel, (blocks * part.batches, part.heads, self.c2p + self.p2c), tiles, "bands", blocks=blocks,
            first_batch=part.first_batch, first_head=part.first_head,
            BLOCK_M=tiles.rows, BLOCK_E=tiles.columns, STEP=step,
        )  # fmt: skip

    def _by_distance(self, part: Part, wanted: dict[str, bool]) -> Launch:
        tiles, step, shares = self.configuration.backward_tables, self.step, self.settings.shares
        batch_splits = min(shares, 1 << (part.batches.bit_length() - 1)) if part.batches else 1
        blocks = -(-(self.distances + step) // tiles.columns)
        return self._launch(
            backward_by_distance, (blocks, part.heads, step * shares * sum(wanted.values())), tiles, "backward_tables",
            **wanted, first_batch=part.first_batch, first_head=part.first_head, batches=part.batches,
            batch_splits=batch_splits, row_splits=shares // batch_splits,
            BLOCK_M=tiles.rows, BLOCK_E=tiles.columns, STEP=step,
        )  # fmt: skip

    def _by_row(self, wanted: dict[str, bool]) -> Launch:
        heads, rows, _ = (self.call.pos_key or self.call.pos_query).shape
        return self._launch(
            backward_by_row, (rows, heads, sum(wanted.values())), SMALL, None, **wanted,
            splits=self.step * self.settings.shares, first_slot=self.call.first_slot,
            BLOCK_E=min(32, 2048 // block_d_of(self.call)),
        )  # fmt: skip

    def _launch(self, kernel, grid: tuple[int, int, int], tiles: Tiles, configured: str | None, **others) -> Launch:
        return new_launch(kernel, grid, self.values | others, tiles, configured)


kept_plan = functools.lru_cache(maxsize=KEPT)(lambda device, *key: Plan(*key))  # a compiled kernel is of one device


def plan_of(call: Call, given: Tensors, settings: Settings) -> Plan:
    """Returns the plan of a call and its results."""
    return kept_plan(call.query.device, tuple([form_of(x) for x in given]), call[TENSORS:], settings)


def given_tensors(call: Call, *results: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Returns the tensors GIVEN: results are output and lse, and for backward what follows them there."""
    slots, first_of_slot = call.device_tables[:2] if call.has_positions else (None, None)
    mask = None if call.mask is None else call.mask.view(torch.uint8)
    given = [*call[:5], mask, *call[6:TENSORS], slots, first_of_slot, *results]
    return given + [None] * (len(GIVEN) - len(given))


def _for_part(launch: Launch, part: Part) -> Launch:
    """Returns a launch for another part of the same size, with the same compiled kernels."""
    return launch._replace(numbers=launch.numbers | {"first_head": part.first_head, "first_batch": part.first_batch})


def block_d_of(call: Call) -> int:
    """Returns the head size, padded to a power of two that tensor cores take."""
    return max(16, 1 << (call.query.shape[-1] - 1).bit_length())


def step_of(length: int) -> int:
    """Returns how far apart the rows of a program lie that writes or reads a band; short sequences have few rows."""
    return 1 if length < 128 else 2 if length < 256 else 4


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _strides(form: Form) -> list[int]:
    """Returns the strides, 0 for dimensions of size 1."""
    return [0 if size == 1 else stride for size, stride in zip(form.shape, form.strides, strict=True)]


def _shares(count: int, most: int) -> list[tuple[int, int]]:
    """Returns (first, number) of even shares of at most ``most``."""
    share = -(-count // -(-count // most)) if count else 1
    return [(first, min(share, count - first)) for first in range(0, count, share)]
