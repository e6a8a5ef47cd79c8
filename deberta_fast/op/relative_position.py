"""Maps the distance of two tokens to a row of the relative-position table.

For a query at position i and a key at position j, DeBERTa reads row sigma(i - j) of a table of R = 2S rows:

    sigma(delta) = clamp(bucket(delta) + S, 0, R - 1)                                        (4)

S is ``position_buckets`` if positive, else ``max_relative_positions``. Without buckets, bucket is the identity (DeBERTa
v1). With B buckets, m = B // 2 and M = ``max_relative_positions`` (v2 and v3), distances beyond m share rows:

    bucket(delta) = delta                                                       where |delta| <= m
                  = sign(delta) (ceil(log(|delta|/m) / log((M-1)/m) (m-1)) + m)  elsewhere     (5)

sigma depends only on i - j, never decreases, and is constant beyond some distance on either side. A short table over
distances therefore describes it for every sequence length. The table is computed once, in Python's float64: the same
formula in half precision puts one distance in five into the wrong bucket.

Hugging Face and Microsoft differ for delta <= -M with buckets: Hugging Face's formula goes on to row 0, Microsoft
clamps the distance to M - 1 first and stays on row 1. ``far_negative`` ("hf" or "ms") chooses.

Source: He et al., DeBERTa (arXiv 2006.03654), equation 3; He et al., DeBERTaV3 (2111.09543) for the released tables.
"""

import bisect
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

FAR_NEGATIVE_RULES = ("hf", "ms")
_LONGEST_TABLE = 1 << 20
_ENDLESS = 1 << 29  # beyond any distance; twice this still fits 32 bits
FARTHEST = 1 << 27  # the largest query offset: its sum with a length fits the 32-bit numbers of kernels


class SlotTable(NamedTuple):
    """sigma over the distances [-N, N]; ``slots[delta + N]`` is the row of distance delta.

    Attributes:
        slots: 2N + 1 row numbers, never decreasing.
        rows: R, the rows of the whole relative-position table.
        far_past: every distance >= this (a key far before its query) reads row ``slots[-1]``.
        far_future: every distance <= this (a negative number) reads row ``slots[0]``.
    """

    slots: tuple[int, ...]
    rows: int
    far_past: int
    far_future: int

    @property
    def reach(self) -> int:
        """N, the distance beyond which sigma is constant on both sides."""
        return len(self.slots) // 2

    def slot(self, distance: int) -> int:
        """sigma(distance)."""
        return self.slots[max(-self.reach, min(self.reach, distance)) + self.reach]

    def window(self, query_length: int, key_length: int, query_offset: int = 0) -> tuple[int, int]:
        """Returns the half-open range of rows that sequences of these lengths can reach.

        A caller may project only these rows and pass their start as ``first_slot``.
        """
        return self.slot(query_offset - key_length + 1), self.slot(query_offset + query_length - 1) + 1


def table_rows(position_buckets: int, max_relative_positions: int) -> int:
    """Returns R = 2S, the rows of a whole relative-position table."""
    return 2 * (position_buckets if position_buckets > 0 else max_relative_positions)


@functools.lru_cache(maxsize=64)
def slot_table(position_buckets: int, max_relative_positions: int, far_negative: str = "hf") -> SlotTable:
    """Returns sigma of equation 4 as a table.

    Args:
        position_buckets: B; 0 or less means no buckets.
        max_relative_positions: M, at least 1, and with buckets at least B // 2 + 2.
        far_negative: "hf" or "ms", as the module describes.

    Raises:
        ValueError: the numbers describe no table.
    """
    buckets, longest = position_buckets, max_relative_positions
    if far_negative not in FAR_NEGATIVE_RULES:
        raise ValueError(f"far_negative must be one of {FAR_NEGATIVE_RULES}, got {far_negative!r}")
    if longest < 1:
        raise ValueError(f"max_relative_positions must be at least 1, got {longest}")
    if buckets > 0 and (buckets < 2 or longest - 1 <= buckets // 2):
        raise ValueError(
            "position_buckets must be at least 2 and max_relative_positions at least position_buckets // 2 + 2, "
            f"got position_buckets={buckets}, max_relative_positions={longest}"
        )
    rows = table_rows(buckets, longest)

    def sigma(distance: int) -> int:
        if buckets > 0 and far_negative == "ms":
            distance = max(1 - longest, min(longest - 1, distance))
        bucketed = _bucket(distance, buckets // 2, longest) if buckets > 0 else distance
        return max(0, min(rows - 1, bucketed + rows // 2))

    far_past = _saturation(sigma, 1)
    far_future = -_saturation(sigma, -1)
    reach = max(far_past, -far_future)
    return SlotTable(tuple(sigma(d) for d in range(-reach, reach + 1)), rows, far_past, far_future)


def _bucket(distance: int, middle: int, longest: int) -> int:
    """Equation 5."""
    if abs(distance) <= middle:
        return distance
    share = math.log(abs(distance) / middle) / math.log((longest - 1) / middle)
    return int(math.copysign(math.ceil(share * (middle - 1)) + middle, distance))


def _saturation(sigma, sign: int) -> int:
    """Returns the smallest n >= 0 such that sigma(sign * d) is the same for all d >= n."""
    limit = sigma(sign << 50)
    if sigma(sign * _LONGEST_TABLE) != limit:
        raise ValueError(f"this relative-position table still changes at distance {_LONGEST_TABLE}: no slot table made")
    low, high = 0, _LONGEST_TABLE  # sigma never decreases, hence a bisection
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sigma(sign * middle) == limit else (middle + 1, high)
    return low


class DeviceTables(NamedTuple):
    """A ``SlotTable`` as kernels read it, int32 on a device.

    Attributes:
        slots: (2N + 1,), sigma over the distances [-N, N].
        first_of_slot: (R + 1,), the first distance of each row, and of the row after the last. The rows at both ends
            serve unlimited distances.
        far_past, far_future: as in ``SlotTable``, on the host.
        past_slot, future_slot: the rows of distances beyond them.
    """

    slots: torch.Tensor
    first_of_slot: torch.Tensor
    far_past: int
    far_future: int
    past_slot: int
    future_slot: int


_on_devices: dict[tuple, DeviceTables] = {}
_MOST_ON_DEVICES = 64


def device_tables(
    position_buckets: int, max_relative_positions: int, far_negative: str, device: torch.device
) -> DeviceTables:
    """Returns ``slot_table`` on a device. The first call copies it there and synchronises.

    ``patch`` and the native models make that call for their device.

    Raises:
        RuntimeError: this is the first call, and a CUDA graph is being captured, which cannot hold the copy.
    """
    key = (position_buckets, max_relative_positions, far_negative, device)
    tables = _on_devices.get(key)
    if tables is None or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _copied_to_device(key)
    return tables


def _copied_to_device(key: tuple) -> DeviceTables:
    tracing = torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()
    if tracing and not torch._C._len_torch_dispatch_stack():
        # The cached tensors must not belong to a trace or a transform. Both are thread-local.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(_copied_to_device, key).result()
    *numbering, device = key
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured before the first call on {device} with position_buckets={key[0]}, "
            f"max_relative_positions={key[1]}: make one call like it before the capture"
        )
    table = slot_table(*numbering)
    first = [bisect.bisect_left(table.slots, row) - table.reach for row in range(table.rows + 1)]
    first = [
        -_ENDLESS if row <= table.slots[0] else _ENDLESS if row > table.slots[-1] else distance
        for row, distance in enumerate(first)
    ]
    with torch.inference_mode(False):  # later calls use the cached tensors under autograd
        slots, first_of_slot = (torch.tensor(x, dtype=torch.int32, device=device) for x in (table.slots, first))
        tables = DeviceTables(slots, first_of_slot, table.far_past, table.far_future, table.slots[-1], table.slots[0])
    # Tensors of a traced program have no data to cache.
    if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()):
        while len(_on_devices) >= _MOST_ON_DEVICES:
            _on_devices.pop(next(iter(_on_devices)), None)
        _on_devices[key] = tables
    return tables


def distance_slots(slots: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Returns sigma of an integer tensor of distances, int64, in its shape; ``slots`` as in ``DeviceTables``."""
    reach = slots.shape[0] // 2
    return slots[distances.clamp(-reach, reach) + reach].long()
