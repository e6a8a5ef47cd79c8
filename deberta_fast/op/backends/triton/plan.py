"""The launches that compute a call: their grids, arguments and workspace.

A plan holds tensors but never reads them. A plan of meta tensors says what would be compiled for a call.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ...call import Call
from ...dropout import threshold_and_scale
from .configuration import Configuration, Tiles
from .kernels.backward_key import backward_key
from .kernels.backward_query import backward_query
from .kernels.bands import backward_by_distance, backward_by_row, backward_rows, band_scores
from .kernels.forward import forward
from .kernels.prepare import backward_delta, expand_table, key_spans

LOG2E = 1 / math.log(2)
# docs/measured.md says what is known about these.
BAND_BYTES = 128 << 20  # near scores held at once: as many heads, or batch rows of one head, as fit
SHARES = 2  # partial sums per residue of rows in the gradients of the tables
WORKSPACE_ALIGN = 128  # rows; every alignment divides it
SMALL = Tiles(0, 0, 4, 1)  # warps and stages of kernels that take little time


class Launch(NamedTuple):
    """One kernel on one grid.

    Attributes:
        configured: the field of the configuration that its tiles come from.
        compiled: Triton's compiled kernel after the first run; launches for other parts share it. Triton takes several
            times longer to look it up than to launch it.
    """

    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, object]
    warps: int
    stages: int
    configured: str | None
    compiled: list

    def run(self) -> None:
        if 0 in self.grid:
            return
        if self.compiled:
            self.compiled[0][(*self.grid, 1, 1)[:3]](*self.arguments.values())
            return
        compiled = self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)
        if compiled is not None:  # as with Triton's interpreter and with hooks that prevent a compilation
            self.compiled.append(compiled)

    def of(self, part: "Part") -> "Launch":
        """Returns this launch for another part of the same size."""
        if "first_head" not in self.arguments:
            return self
        return self._replace(
            arguments=self.arguments | {"first_head": part.first_head, "first_batch": part.first_batch}
        )


class Part(NamedTuple):
    """The heads and batch rows whose bands are held at the same time."""

    first_head: int
    heads: int
    first_batch: int
    batches: int


class Plan:
    """The launches of one call. ``values`` has the arguments of all kernels by name."""

    def __init__(self, call: Call, configuration: Configuration, precision: str):
        self.call, self.configuration = call, configuration
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
        itemsize = call.query.element_size()
        aligned = all(stride * itemsize % 16 == 0 for x in call[:3] for stride in _strides(x))
        self.unit = 16 // itemsize if aligned else 1
        self.step = step_of(max(self.query_length, self.key_length))
        mask_b, mask_h, mask_i, mask_j = (0, 0, 0, 0) if mask is None else _strides(mask)
        threshold, inverse_keep = threshold_and_scale(call.dropout_p)
        self.values = {
            "query": call.query, "key": call.key, "value": call.value,
            "pos_key": call.pos_key, "pos_query": call.pos_query,
            "mask": None if mask is None else mask.view(torch.uint8),
            "mask_b": 0 if self.packed else mask_b, "mask_h": mask_h, "mask_i": mask_i, "mask_j": mask_j,
            "cu_seqlens": call.cu_seqlens, "key_spans": None, "seed": call.seed, "c2p": None, "p2c": None,
            "c2p_b": 0, "c2p_h": 0, "c2p_pitch": 0, "p2c_b": 0, "p2c_h": 0, "p2c_pitch": 0,
            "query_length": self.query_length, "key_length": self.key_length, "offset": call.query_offset,
            "first_distance": 0, "distances": 0, "far_past": 0, "far_future": 0, "past_slot": 0, "future_slot": 0,
            "heads": heads, "scale": call.scale * LOG2E, "softmax_scale": call.scale,
            "band_scale": call.band_scale, "inverse_band_scale": 1 / call.band_scale,
            "threshold": threshold, "inverse_keep": inverse_keep,
            "HEAD_DIM": size, "BLOCK_D": block_d_of(call), "UNIT": self.unit,
            "LARGEST": torch.finfo(call.query.dtype).max, "PRECISION": precision, "PACKED": self.packed,
            "SPANS": False, "MASK": self.mask_kind, "DROPOUT": call.dropout_p > 0,
            "ORIGIN": call.seed is not None and len(call.seed) > 1,
            "C2P": self.c2p, "P2C": self.p2c, "ALIGN": configuration.alignment,
        }  # fmt: skip
        for name, x in zip("qkv", call[:3], strict=True):
            self._add_strides(name, x, self.unit)
        for name, table in (("pos_key", call.pos_key), ("pos_query", call.pos_query)):
            stride_h, stride_l, _ = (0, 0, 0) if table is None else table.stride()
            self.values |= {f"{name}_h": stride_h, f"{name}_l": stride_l}
        if call.has_positions:
            self._add_geometry()

    def forward(self, output: torch.Tensor, lse: torch.Tensor) -> Iterator[Launch]:
        """Yields the launches that fill output and lse."""
        self._add_outputs(lse, o=output)
        self.values |= {"output": output}
        yield from self._prepare()
        yield from self._part_by_part(self._forward_part)

    def backward(self, output, lse, grad_output, grad_lse, grads) -> Iterator[Launch]:
        """Yields the launches that fill grads: those of query, key, value and of the tables that are wanted."""
        sums = {}
        self._add_outputs(lse, o=output, do=grad_output, dq=grads[0], dk=grads[1], dv=grads[2])
        self.values |= {"output": output, "grad_output": grad_output, "grad_lse": grad_lse}
        self.values |= dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=False))
        self._add_strides("dlse", grad_lse, 1)
        self.values |= {"partial": None, "far_pos_key": None, "far_pos_query": None, "far_count": 0}
        yield from self._prepare()
        yield self._delta()
        if self.call.has_positions:
            sums = self._table_sums(grads)
        yield from self._part_by_part(lambda part: self._backward_part(part, grads, sums))
        for name, far, grad in (("c2p", "far_pos_key", grads[3]), ("p2c", "far_pos_query", grads[4])):
            if grad is not None:
                yield self._by_row(sums[name], self.values[far], grad)

    def _part_by_part(self, launches: Callable[[Part], Iterator[Launch]]) -> Iterator[Launch]:
        known: dict[tuple[int, int], list[Launch]] = {}
        for part in self._parts():
            size = part.heads, part.batches
            if size not in known:
                known[size] = list(launches(part))
            yield from (launch.of(part) for launch in known[size])

    def _forward_part(self, part: Part) -> Iterator[Launch]:
        yield from self._band_scores(part)
        yield self._blocks(forward, self.query_length, part, "BLOCK_M", "BLOCK_N")

    def _backward_part(self, part: Part, grads: list, sums: dict[str, torch.Tensor]) -> Iterator[Launch]:
        yield from self._band_scores(part)
        yield self._blocks(backward_key, self.key_length, part, "BLOCK_N", "BLOCK_M")
        if self.p2c:
            yield self._band_blocks(backward_rows, "p2c", part, grad_x=grads[1])
        yield self._blocks(backward_query, self.query_length, part, "BLOCK_M", "BLOCK_N")
        if self.c2p:
            yield self._band_blocks(backward_rows, "c2p", part, grad_x=grads[0])
        for name in sums:
            yield self._by_distance(name, sums[name], part)

    def _add_strides(self, name: str, tensor: torch.Tensor, unit: int) -> None:
        """Adds strides in units. Packed sequences share one batch row, so theirs is 0."""
        b, h, l, *_ = _strides(tensor)
        self.values |= {f"{name}_b": 0 if self.packed else b // unit, f"{name}_h": h // unit, f"{name}_l": l // unit}

    def _add_outputs(self, lse: torch.Tensor, **heads: torch.Tensor) -> None:
        for name, tensor in heads.items():
            self._add_strides(name, tensor, self.unit)
        self.values |= {"lse": lse, "lse_b": 0 if self.packed else lse.stride(0), "lse_h": lse.stride(1)}

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
        head_bytes = max(1, rows * 16 * call.query.element_size() * (1 if self.packed else batches))
        heads_at_once = min(heads, max(1, BAND_BYTES // head_bytes))
        batches_at_once = batches
        if head_bytes > BAND_BYTES and not self.packed:
            batches_at_once = max(1, BAND_BYTES * batches // head_bytes)
        return [
            Part(h, n, b, m) for h, n in _shares(heads, heads_at_once) for b, m in _shares(batches, batches_at_once)
        ]

    def _prepare(self) -> Iterator[Launch]:
        """Yields the launches for the key spans of a padding mask and for the tables by distance."""
        call = self.call
        if self.mask_kind == "keys" and not self.packed:
            spans = call.query.new_empty((self.batches, 4), dtype=torch.int32)
            self.values |= {"key_spans": spans, "SPANS": True}
            yield self._launch(
                key_spans, (self.batches,), SMALL, None, spans=spans, length=self.key_length, BLOCK_N=1024
            )
        if not call.has_positions:
            return
        slots, self.first_of_slot = call.device_tables[:2]
        for name, table in (("key_table", call.pos_key), ("query_table", call.pos_query)):
            if table is not None:
                heads, rows, size = table.shape
                out = self.values[name] = table.new_empty(heads, self.distances, size)
                yield self._launch(
                    expand_table, (-(-self.distances // 64), heads), SMALL, None, table=table, slots=slots, out=out,
                    table_h=table.stride(0), table_l=table.stride(1), reach=len(slots) // 2,
                    first_slot=call.first_slot, rows=rows, BLOCK_E=64,
                )  # fmt: skip

    def _band_scores(self, part: Part) -> Iterator[Launch]:
        """Allocates the bands of the first, largest part, and yields the launches that write the scores of a part."""
        if not self.call.has_positions:
            return
        backward = "grad_output" in self.values
        wanted = {"c2p": self.c2p, "p2c": self.p2c or backward}  # backward passes dA on in the p2c band
        for name in (name for name, want in wanted.items() if want):
            rows = self._workspace_rows(self.query_length if name == "c2p" else self.key_length)
            count = part.heads * rows * (1 if self.packed else part.batches)
            if self.values[name] is None:
                shape = (count, self.values[f"{name}_pitch"] * 16)
                self.values[name] = self.call.query.new_empty(shape)
            if backward and (self.values["partial"] is None or len(self.values["partial"]) < count):
                shape = (count, self.call.query.shape[3])
                self.values["partial"] = self.call.query.new_empty(shape, dtype=torch.float32)
            self.values |= {f"{name}_b": 0 if self.packed else part.heads * rows, f"{name}_h": rows}
        if self.c2p:
            yield self._band_blocks(band_scores, "c2p", part)
        if self.p2c:
            yield self._band_blocks(band_scores, "p2c", part)

    def _workspace_rows(self, length: int) -> int:
        """Returns the rows of the workspace per batch row and head, or per head of all packed sequences."""
        if self.packed:
            return (self.call.query.shape[2] // WORKSPACE_ALIGN + self.batches + 1) * WORKSPACE_ALIGN
        return _round_up(length, WORKSPACE_ALIGN)

    def _delta(self) -> Launch:
        heads, rows = self.call.query.shape[1], self._workspace_rows(self.query_length)
        for name in ("delta", "lse_log2"):
            count = heads * rows * (1 if self.packed else self.batches)
            self.values[name] = self.call.query.new_empty(count, dtype=torch.float32)
        self.values |= {"delta_b": 0 if self.packed else heads * rows // 16, "delta_h": rows // 16}
        blocks = -(-self.query_length // WORKSPACE_ALIGN)
        return self._launch(
            backward_delta, (blocks * self.batches, heads), SMALL, None, blocks=blocks, BLOCK_M=WORKSPACE_ALIGN
        )

    def _band_arguments(self, name: str) -> dict[str, object]:
        """Returns the arguments of band kernels for c2p, where rows are queries, or p2c, where rows are keys."""
        v, keys = self.values, name == "p2c"
        rows, columns = ("k", "q") if keys else ("q", "k")
        lengths = {"q": self.query_length, "k": self.key_length}
        return {
            "band": v[name], "table": v["query_table" if keys else "key_table"],
            "x": v["key" if keys else "query"], **{f"x_{s}": v[f"{rows}_{s}"] for s in "bhl"},
            "band_b": v[f"{name}_b"], "band_h": v[f"{name}_h"], "pitch": v[f"{name}_pitch"],
            "rows_length": lengths[rows], "columns_length": lengths[columns],
            "offset": -v["offset"] if keys else v["offset"],
            "past": -v["far_future"] if keys else v["far_past"],
            "future": -v["far_past"] if keys else v["far_future"],
            "direction": 1 if keys else -1, "ROWS_ARE_KEYS": keys,
        }  # fmt: skip

    def _table_sums(self, grads: list) -> dict[str, torch.Tensor]:
        """Allocates the sums by distance, one per split, and the far sums, one per key block; returns the former."""
        query = self.call.query
        heads, size = query.shape[1], query.shape[3]
        rows = self.configuration.backward_key.rows
        count = self.batches * -(-self.key_length // rows)
        if self.packed:
            count = query.shape[2] // rows + self.batches + 1
        self.values["far_count"] = count
        sums = {}
        terms = ("c2p", "far_pos_key", self.c2p, grads[3]), ("p2c", "far_pos_query", self.p2c, grads[4])
        for name, far, present, grad in terms:
            if present:  # backward_key fills them even if the table's gradient is not wanted
                self.values[far] = query.new_zeros((heads, 2, count, size), dtype=torch.float32)
            if grad is not None:
                sums[name] = query.new_zeros((self.step * SHARES, heads, self.distances, size), dtype=torch.float32)
        return sums

    def _blocks(self, kernel, length: int, part: Part, own: str, other: str) -> Launch:
        """Returns a launch with one program per block of rows, batch row and head of a part."""
        name = kernel.__name__
        tiles = getattr(self.configuration, name)
        blocks = -(-length // tiles.rows)
        return self._launch(
            kernel, (blocks * part.batches, part.heads), tiles, name, blocks=blocks, first_batch=part.first_batch,
            first_head=part.first_head, **{own: tiles.rows, other: tiles.columns},
        )  # fmt: skip

    def _band_blocks(self, kernel, name: str, part: Part, **others) -> Launch:
        """Returns a launch with one program per block of rows of a band, which are ``step`` apart."""
        arguments, tiles, step = self._band_arguments(name), self.configuration.bands, self.step
        # Up to a multiple of the alignment: every cell that a near tile reads must be finite.
        rows = _round_up(arguments["rows_length"], self.configuration.alignment)
        blocks = -(-rows // (tiles.rows * step)) * step
        if others:
            others |= {f"dx_{s}": self.values[f"d{'k' if name == 'p2c' else 'q'}_{s}"] for s in "bhl"}
        return self._launch(
            kernel, (blocks * part.batches, part.heads), tiles, "bands", **arguments, **others, blocks=blocks,
            first_batch=part.first_batch, first_head=part.first_head,
            BLOCK_M=tiles.rows, BLOCK_E=tiles.columns, STEP=step,
        )  # fmt: skip

    def _by_distance(self, name: str, sums: torch.Tensor, part: Part) -> Launch:
        tiles, step, shares = self.configuration.backward_tables, self.step, len(sums) // self.step
        batch_splits = min(shares, 1 << (part.batches.bit_length() - 1)) if part.batches else 1
        return self._launch(
            backward_by_distance, (-(-(self.distances + step) // tiles.columns), part.heads, len(sums)),
            tiles, "backward_tables", **self._band_arguments(name), by_distance=sums, first_batch=part.first_batch,
            first_head=part.first_head, batches=part.batches, batch_splits=batch_splits,
            row_splits=shares // batch_splits, BLOCK_M=tiles.rows, BLOCK_E=tiles.columns, STEP=step,
        )  # fmt: skip

    def _by_row(self, sums: torch.Tensor, far: torch.Tensor, grad: torch.Tensor) -> Launch:
        return self._launch(
            backward_by_row, (grad.shape[1], grad.shape[0]), SMALL, None, by_distance=sums, far_sums=far,
            grad_table=grad, first_of_slot=self.first_of_slot, splits=len(sums),
            first_slot=self.call.first_slot, BLOCK_E=min(32, 2048 // block_d_of(self.call)),
        )  # fmt: skip

    def _launch(self, kernel, grid: tuple[int, ...], tiles: Tiles, configured: str | None, **others) -> Launch:
        values = self.values | others
        arguments = {name: values[name] for name in kernel.arg_names}
        return Launch(kernel, grid, arguments, tiles.warps, tiles.stages, configured, [])


def block_d_of(call: Call) -> int:
    """Returns the head size, padded to a power of two that tensor cores take."""
    return max(16, 1 << (call.query.shape[-1] - 1).bit_length())


def step_of(length: int) -> int:
    """Returns how far apart the rows of a program lie that writes or reads a band; short sequences have few rows."""
    return 1 if length < 128 else 2 if length < 256 else 4


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _strides(tensor: torch.Tensor) -> list[int]:
    """Returns all strides of a mask, or all but the last of query-like tensors; 0 for dimensions of size 1."""
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return strides if tensor.dtype == torch.bool else strides[:3]


def _shares(count: int, most: int) -> list[tuple[int, int]]:
    """Returns (first, number) of even shares of at most ``most``."""
    share = -(-count // -(-count // most)) if count else 1
    return [(first, min(share, count - first)) for first in range(0, count, share)]
