"""One position term of a near segment, and its gradients (equations 6 and 9).

With the queries last to first, the distance of pair (r, c) grows with r + c. So c2p and p2c are one thing, said of the
scores and of their transpose: row r meets the rows r, r + 1, ... of a table by distance. A strip of rows is multiplied
with the window of the table that it shares, and row r of the product starts at column r: a strided view.
"""

from collections.abc import Iterator

import torch

from .scratch import Scratch

STRIP_ROWS = 64, 128  # of small and of large segments: less work in vain against larger products
SMALL = 512  # rows and columns together


def add_term(scores: torch.Tensor, x: torch.Tensor, by_distance: torch.Tensor, scratch: Scratch) -> None:
    """scores[h, b, r, c] += x[h, b, r] . by_distance[h, r + c]

    Shapes (h, b, n, m), (h, b, n, D) and (h, n + m or more, D).
    """
    columns = scores.shape[3]
    for rows, window in _strips(scores):
        strip = x[:, :, rows]
        product = scratch.matmul("product", _by_head(strip), by_distance[:, window].mT)
        scores[:, :, rows] += _skew(product.view(*strip.shape[:3], -1), columns)


def add_gradients(
    grad_scores: torch.Tensor,
    x: torch.Tensor,
    by_distance: torch.Tensor,
    grad_x: torch.Tensor,
    grad_by_distance: torch.Tensor,
    scratch: Scratch,
) -> None:
    """grad_x[h, b, r] += sum_c g[h, b, r, c] by_distance[h, r + c], and grad_by_distance[h, r + c] likewise of x."""
    columns = grad_scores.shape[3]
    for rows, window in _strips(grad_scores):
        strip = x[:, :, rows]
        skewed = scratch.zeros("skewed", *strip.shape[:3], window.stop - window.start)
        _skew(skewed, columns).copy_(grad_scores[:, :, rows])
        skewed = skewed.flatten(1, 2)
        grad_x[:, :, rows] += scratch.matmul("product", skewed, by_distance[:, window]).view(strip.shape)
        grad_by_distance[:, window].baddbmm_(skewed.mT, _by_head(strip))


def _strips(scores: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of each strip, and those of the table by distance that they meet."""
    *_, rows, columns = scores.shape
    step = STRIP_ROWS[rows + columns > SMALL]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), slice(start, stop + columns)


def _by_head(strip: torch.Tensor) -> torch.Tensor:
    """(h, b, n, D) to (h, b n, D): all batch rows of a head meet its table in one product."""
    return strip.reshape(len(strip), -1, strip.shape[-1])


def _skew(product: torch.Tensor, columns: int) -> torch.Tensor:
    """The view v[..., r, c] = product[..., r, r + c]."""
    *outer, row, one = product.stride()
    return product.as_strided((*product.shape[:-1], columns), (*outer, row + one, one))
