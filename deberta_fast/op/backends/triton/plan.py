"""From the inputs of a call to the launches that compute it: shapes, strides and sizes of the workspace.

A plan holds tensors but never reads them: made of meta tensors, it says what would be compiled for a call.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ...call import Call
from .configuration import Configuration, Tiles
from .kernels.backward_delta import backward_delta
from .kernels.backward_key import backward_key
from .kernels.backward_query import backward_query
from .kernels.backward_rows import backward_rows
from .kernels.backward_tables import backward_by_distance, backward_by_row
from .kernels.band_scores import band_scores
from .kernels.expand_table import expand_table
from .kernels.forward import forward
from .kernels.key_spans import key_spans

LOG2E = 1 / math.log(2)
# No GPU has measured these yet (docs/measured.md).
BAND_BYTES = 128 << 20  # of near scores held at once: as many heads, or batch rows of one head, as fit
SHARES = 2  # of the rows of each residue in the gradients of the tables: each keeps a sum of its own
ROOM = 128  # rows that the workspace is cut into: whole grains
SMALL = Tiles(0, 0, 4, 1)  # of kernels that hardly take time


class Launch(NamedTuple):
    """One kernel on one grid.

    Attributes:
        configured: the field of the configuration that its tiles are from.
        compiled: what Triton compiled for it, once it ran; shared with its likes for other parts. To find that takes
            Triton several times longer than the launch itself.
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
        found = self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)
        if found is not None:  # Triton's interpreter compiles nothing
            self.compiled.append(found)

    def of(self, part: "Part") -> "Launch":
        """The same for another part of the same size."""
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
    """What the launches of one call share."""

    def __init__(self, inputs: Call, configuration: Configuration, precision: str):
        self.inputs, self.configuration = inputs, configuration
        batch, heads, query_rows, size = inputs.query.shape
        self.packed = inputs.cu_seqlens is not None
        self.batches = inputs.cu_seqlens.shape[0] - 1 if self.packed else batch
        self.query_length, self.key_length = query_rows, inputs.key.shape[2]
        if self.packed:
            self.query_length = self.key_length = inputs.max_seqlen
        self.mask_kind = self._mask_kind()
        self.c2p, self.p2c = inputs.pos_key is not None, inputs.pos_query is not None
        itemsize = inputs.query.element_size()
        heads_tensors = (inputs.query, inputs.key, inputs.value)
        aligned = all(stride * itemsize % 16 == 0 for t in heads_tensors for stride in _strides(t))
        self.unit = 16 // itemsize if aligned else 1
        # Rows of a program that writes or reads a band by distance: as far apart as the sequence is worth it.
        self.step = step_of(max(self.query_length, self.key_length))
        self.values = {
            "query": inputs.query, "key": inputs.key, "value": inputs.value,
            "pos_key": inputs.pos_key, "pos_query": inputs.pos_query,
            "mask": None if inputs.mask is None else inputs.mask.view(torch.uint8),
            "cu_seqlens": inputs.cu_seqlens, "key_spans": None, "seed": inputs.seed, "c2p": None, "p2c": None,
            "c2p_b": 0, "c2p_h": 0, "c2p_pitch": 0, "p2c_b": 0, "p2c_h": 0, "p2c_pitch": 0,
            "query_length": self.query_length, "key_length": self.key_length, "offset": inputs.query_offset,
            "first_distance": 0, "distances": 0, "far_past": 0, "far_future": 0, "past_slot": 0, "future_slot": 0,
            "heads": heads, "scale": inputs.scale * LOG2E, "softmax_scale": inputs.scale,
            "band_scale": inputs.band_scale, "inverse_band_scale": 1 / inputs.band_scale,
            "threshold": min(round(inputs.dropout_p * 2**32) - 2**31, 2**31 - 1),
            "inverse_keep": 1 / (1 - inputs.dropout_p),
            "SIZE": size, "BLOCK_SIZE": block_size_of(inputs), "UNIT": self.unit,
            "LARGEST": torch.finfo(inputs.query.dtype).max, "PRECISION": precision, "PACKED": self.packed,
            "SPANS": False, "MASK": self.mask_kind, "DROPOUT": inputs.dropout_p > 0,
            "C2P": self.c2p, "P2C": self.p2c, "GRAIN": configuration.grain,
        }  # fmt: skip
        for name, t in zip("qkv", heads_tensors, strict=True):
            self._add_strides(name, t, self.unit)
        for name, t in (("pos_key", inputs.pos_key), ("pos_query", inputs.pos_query)):
            _, h, l, _ = (0, 0, 0, 0) if t is None else (0, *t.stride())
            self.values |= {f"{name}_h": h, f"{name}_l": l}
        mask_strides = (0, 0, 0, 0) if inputs.mask is None else _strides(inputs.mask)
        self.values |= dict(zip(("mask_b", "mask_h", "mask_i", "mask_j"), mask_strides, strict=True))
        if self.packed:
            self.values["mask_b"] = 0
        if inputs.has_positions:
            self._add_geometry()

    def forward(self, output: torch.Tensor, lse: torch.Tensor) -> Iterator[Launch]:
        """The launches that fill output and lse."""
        self._add_outputs(lse, o=output)
        self.values |= {"output": output}
        yield from self._prepare()
        yield from self._part_by_part(self._forward_part)

    def backward(self, output, lse, grad_output, grad_lse, grads) -> Iterator[Launch]:
        """The launches that fill grads: those of query, key, value and of the tables that are there."""
        inputs, sums = self.inputs, {}
        self._add_outputs(lse, o=output, do=grad_output, dq=grads[0], dk=grads[1], dv=grads[2])
        self.values |= {"output": output, "grad_output": grad_output, "grad_lse": grad_lse}
        self.values |= dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=False))
        self._add_strides("dlse", grad_lse, 1)
        self.values |= {"partial": None, "far_pos_key": None, "far_pos_query": None, "far_count": 0}
        yield from self._prepare()
        yield self._delta()
        if inputs.has_positions:
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
        yield self._rows(forward, "forward", self.query_length, part)

    def _backward_part(self, part: Part, grads: list, sums: dict[str, torch.Tensor]) -> Iterator[Launch]:
        yield from self._band_scores(part)
        yield self._rows(backward_key, "backward_key", self.key_length, part)
        if self.p2c:
            yield self._spread(backward_rows, "p2c", part, grad_x=grads[1])
        yield self._rows(backward_query, "backward_query", self.query_length, part)
        if self.c2p:
            yield self._spread(backward_rows, "c2p", part, grad_x=grads[0])
        for name in sums:
            yield self._by_distance(name, sums[name], part)

    def _mask_kind(self) -> str:
        mask = self.inputs.mask
        if mask is None:
            return "none"
        return "keys" if mask.shape[1] == mask.shape[2] == 1 else "pairs"

    def _add_strides(self, name: str, tensor: torch.Tensor, unit: int) -> None:
        """In units, and none from batch row to batch row of packed sequences: there is one."""
        b, h, l, *_ = _strides(tensor)
        self.values |= {f"{name}_b": 0 if self.packed else b // unit, f"{name}_h": h // unit, f"{name}_l": l // unit}

    def _add_outputs(self, lse: torch.Tensor, **heads: torch.Tensor) -> None:
        for name, tensor in heads.items():
            self._add_strides(name, tensor, self.unit)
        self.values |= {"lse": lse, "lse_b": 0 if self.packed else lse.stride(0), "lse_h": lse.stride(1)}

    def _add_geometry(self) -> None:
        inputs, table, grain = self.inputs, self.inputs.table, self.configuration.grain
        past, future, offset = table.far_past, table.far_future, inputs.query_offset
        query_grains, key_grains = (-(-n // grain) * grain for n in (self.query_length, self.key_length))
        widest = (past - future + 3 * grain - 4) // grain * grain
        # The distances i - j of all pairs in near tiles.
        first = max(future - 2 * grain, offset - key_grains) + 1
        stop = min(past + 2 * grain, offset + query_grains) + 1
        self.distances = max(stop - first, 1)
        self.values |= {
            "far_past": past, "far_future": future,
            "past_slot": inputs.past_row, "future_slot": inputs.future_row,
            "first_distance": first, "distances": self.distances,
            "c2p_pitch": max(min(widest, key_grains), grain) // 16,
            "p2c_pitch": max(min(widest, query_grains), grain) // 16,
        }  # fmt: skip

    def _parts(self) -> list[Part]:
        inputs = self.inputs
        heads, batches = inputs.query.shape[1], self.batches
        if not inputs.has_positions:
            return [Part(0, heads, 0, batches)]
        rows = self._room(self.query_length) * self.values["c2p_pitch"]
        rows += self._room(self.key_length) * self.values["p2c_pitch"]
        head_bytes = max(1, rows * 16 * inputs.query.element_size() * (1 if self.packed else batches))
        heads_at_once = min(heads, max(1, BAND_BYTES // head_bytes))
        batches_at_once = batches
        if head_bytes > BAND_BYTES and not self.packed:
            batches_at_once = max(1, BAND_BYTES * batches // head_bytes)
        return [
            Part(h, n, b, m) for h, n in _shares(heads, heads_at_once) for b, m in _shares(batches, batches_at_once)
        ]

    def _prepare(self) -> Iterator[Launch]:
        """Spans of the keys that a padding mask leaves, and tables by distance."""
        inputs = self.inputs
        if self.mask_kind == "keys" and not self.packed:
            spans = inputs.query.new_empty((self.batches, 4), dtype=torch.int32)
            self.values |= {"key_spans": spans, "SPANS": True}
            yield self._launch(
                key_spans, (self.batches,), SMALL, None, spans=spans, length=self.key_length, COLUMNS=1024
            )
        if not inputs.has_positions:
            return
        slots, self.first_of_slot = inputs.device_tables[:2]
        for name, table in (("key_table", inputs.pos_key), ("query_table", inputs.pos_query)):
            if table is not None:
                heads, rows, size = table.shape
                out = self.values[name] = table.new_empty(heads, self.distances, size)
                yield self._launch(
                    expand_table, (-(-self.distances // 64), heads), SMALL, None, table=table, slots=slots, out=out,
                    table_h=table.stride(0), table_l=table.stride(1), reach=len(slots) // 2,
                    first_slot=inputs.first_slot, rows=rows, ROWS=64,
                )  # fmt: skip

    def _band_scores(self, part: Part) -> Iterator[Launch]:
        """Room for the bands of a part, and the scores in them."""
        if not self.inputs.has_positions:
            return
        backward = "grad_output" in self.values
        wanted = {"c2p": self.c2p, "p2c": self.p2c or backward}  # backward hands dA on in the second
        for name in (name for name, want in wanted.items() if want):
            room = self._room(self.query_length if name == "c2p" else self.key_length)
            count = part.heads * room * (1 if self.packed else part.batches)
            if self.values[name] is None:  # the first part is the largest
                shape = (count, self.values[f"{name}_pitch"] * 16)
                self.values[name] = self.inputs.query.new_empty(shape)
            if backward and (self.values["partial"] is None or len(self.values["partial"]) < count):
                shape = (count, self.inputs.query.shape[3])
                self.values["partial"] = self.inputs.query.new_empty(shape, dtype=torch.float32)
            self.values |= {f"{name}_b": 0 if self.packed else part.heads * room, f"{name}_h": room}
        if self.c2p:
            yield self._spread(band_scores, "c2p", part)
        if self.p2c:
            yield self._spread(band_scores, "p2c", part)

    def _room(self, length: int) -> int:
        """Rows of the workspace for a batch row and head, or for a head of all sequences."""
        if self.packed:
            return (self.inputs.query.shape[2] // ROOM + self.batches + 1) * ROOM
        return -(-length // ROOM) * ROOM

    def _spread(self, kernel, name: str, part: Part, **others) -> Launch:
        """A program for each block of rows STEP apart of a band."""
        side, tiles, step = self._side(name), self.configuration.bands, self.step
        # To the end of the last grain: every cell that a near tile reads must be finite.
        grains = -(-side["rows_length"] // self.configuration.grain)
        blocks = -(-grains * self.configuration.grain // (tiles.rows * step)) * step
        if others:
            others |= {f"dx_{s}": self.values[f"d{'k' if name == 'p2c' else 'q'}_{s}"] for s in "bhl"}
        return self._launch(
            kernel, (blocks * part.batches, part.heads), tiles, "bands", **side, **others, blocks=blocks,
            first_batch=part.first_batch, first_head=part.first_head,
            ROWS=tiles.rows, WINDOW=tiles.columns, STEP=step,
        )  # fmt: skip

    def _delta(self) -> Launch:
        heads, room = self.inputs.query.shape[1], self._room(self.query_length)
        for name in ("delta", "shift"):
            count = heads * room * (1 if self.packed else self.batches)
            self.values[name] = self.inputs.query.new_empty(count, dtype=torch.float32)
        self.values |= {"delta_b": 0 if self.packed else heads * room // 16, "delta_h": room // 16}
        blocks = -(-self.query_length // ROOM)
        return self._launch(backward_delta, (blocks * self.batches, heads), SMALL, None, blocks=blocks, ROWS=ROOM)

    def _side(self, name: str) -> dict[str, object]:
        """What band kernels know of c2p, rows being queries, or of p2c, rows being keys."""
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
        """By distance, one sum a split; and the far sums, one a key block."""
        query = self.inputs.query
        heads, size = query.shape[1], query.shape[3]
        rows = self.configuration.backward_key.rows
        count = self.batches * -(-self.key_length // rows)
        if self.packed:
            count = query.shape[2] // rows + self.batches + 1
        self.values["far_count"] = count
        sums = {}
        terms = ("c2p", "far_pos_key", self.c2p, grads[3]), ("p2c", "far_pos_query", self.p2c, grads[4])
        for name, far, present, grad in terms:
            if present:  # backward_key fills them, whoever wants them
                self.values[far] = query.new_zeros((heads, 2, count, size), dtype=torch.float32)
            if grad is not None:
                sums[name] = query.new_zeros((self.step * SHARES, heads, self.distances, size), dtype=torch.float32)
        return sums

    def _by_distance(self, name: str, sums: torch.Tensor, part: Part) -> Launch:
        tiles, step, shares = self.configuration.backward_tables, self.step, len(sums) // self.step
        batch_splits = min(shares, 1 << (part.batches.bit_length() - 1)) if part.batches else 1
        return self._launch(
            backward_by_distance, (-(-(self.distances + step) // tiles.columns), part.heads, len(sums)),
            tiles, "backward_tables", **self._side(name), by_distance=sums, first_batch=part.first_batch,
            first_head=part.first_head, batches=part.batches, batch_splits=batch_splits,
            row_splits=shares // batch_splits, ROWS=tiles.rows, WINDOW=tiles.columns, STEP=step,
        )  # fmt: skip

    def _by_row(self, sums: torch.Tensor, far: torch.Tensor, grad: torch.Tensor) -> Launch:
        return self._launch(
            backward_by_row, (grad.shape[1], grad.shape[0]), SMALL, None, by_distance=sums, far_sums=far,
            grad_table=grad, first_of_slot=self.first_of_slot, splits=len(sums),
            first_slot=self.inputs.first_slot, ROWS=min(32, 2048 // block_size_of(self.inputs)),
        )  # fmt: skip

    def _rows(self, kernel, configured: str, length: int, part: Part) -> Launch:
        """A program for each block of rows of each batch row and head of the part."""
        tiles = getattr(self.configuration, configured)
        blocks = -(-length // tiles.rows)
        return self._launch(
            kernel, (blocks * part.batches, part.heads), tiles, configured, blocks=blocks,
            first_batch=part.first_batch, first_head=part.first_head, ROWS=tiles.rows, COLUMNS=tiles.columns,
        )  # fmt: skip

    def _launch(self, kernel, grid: tuple[int, ...], tiles: Tiles, configured: str | None, **others) -> Launch:
        values = self.values | others
        arguments = {name: values[name] for name in kernel.arg_names}
        return Launch(kernel, grid, arguments, tiles.warps, tiles.stages, configured, [])


def block_size_of(inputs: Call) -> int:
    """The head size, padded to a power of two that tensor cores take."""
    return max(16, 1 << (inputs.query.shape[-1] - 1).bit_length())


def step_of(length: int) -> int:
    """How far apart the rows lie of a program that writes or reads a band: as far as it finds enough of them."""
    return 1 if length < 128 else 2 if length < 256 else 4


def _strides(tensor: torch.Tensor) -> list[int]:
    """All but the last of query-like tensors; none along dimensions of one, whatever torch says there."""
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return strides if tensor.dtype == torch.bool else strides[:3]


def _shares(count: int, most: int) -> list[tuple[int, int]]:
    """(first, number) of even shares of at most ``most``."""
    share = -(-count // -(-count // most)) if count else 1
    return [(first, min(share, count - first)) for first in range(0, count, share)]
