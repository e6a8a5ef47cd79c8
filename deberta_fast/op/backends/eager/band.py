"""One position term of a near segment, and its gradients (equations 6 and 9).

With the queries last to first, the distance of pair (r, c) grows with r + c. c2p and p2c are then the same computation,
on the scores and on their transpose: row r reads the rows r, r + 1, ... of a table by distance. A strip of rows is
multiplied by its window of the table, and row r of the product starts at column r: a strided view.
"""

from collections.abc import Iterator

import torch

from .scratch import Scratch

STRIP_ROWS = 64, 128  # of small and of large segments: short strips waste less work, long ones make larger products
SMALL = 512  # rows and columns together, at most


def add_term(scores: torch.Tensor, x: torch.Tensor, by_distance: torch.Tensor, scratch: Scratch) -> None:
    """Adds x[h, b, r] . by_distance[h, r + c] to scores[h, b, r, c].

    Shapes: scores (h, b, n, m), x (h, b, n, D), by_distance (h, n + m or more, D).
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
    """Adds sum_c g[h, b, r, c] by_distance[h, r + c] to grad_x[h, b, r], and g[h, b, r, c] x[h, b, r] to
    grad_by_distance[h, r + c]; g are grad_scores.
    """
    columns = grad_scores.shape[3]
    for rows, window in _strips(grad_scores):
        strip = x[:, :, rows]
        skewed = scratch.zeros("skewed", *strip.shape[:3], window.stop - window.start)
        _skew(skewed, columns).copy_(grad_scores[:, :, rows])
        skewed = skewed.flatten(1, 2)
        grad_x[:, :, rows] += scratch.matmul("product", skewed, by_distance[:, window]).view(strip.shape)
        grad_by_distance[:, window].baddbmm_(skewed.mT, _by_head(strip))


def _strips(scores: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields the rows of each strip, and the rows of the table by distance that they read."""
    *_, rows, columns = scores.shape
    step = STRIP_ROWS[rows + columns > SMALL]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), slice(start, stop + columns)


def _by_head(strip: torch.Tensor) -> torch.Tensor:
    """Reshapes (h, b, n, D) to (h, b n, D): one product per head and table."""
    return strip.reshape(len(strip), -1, strip.shape[-1])


def _skew(product: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns the view v[..., r, c] = product[..., r, r + c]."""
    *outer, row, one = product.stride()
    return product.as_strided((*product.shape[:-1], columns), (*outer, row + one, one))
