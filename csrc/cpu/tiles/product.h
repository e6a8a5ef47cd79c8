// Products of matrices in tiles, C = In + A B: A is bfloat16 in rows, B bfloat16 in interleaved pairs of rows, and C
// float32. All three are any distance apart in memory from row to row. The skew of the position terms is such a
// distance: of the rows of C in the scores (6), and of A or B in the gradients (9).
#pragma once

#include "tiles.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

// Row m begins at data + m * row.
struct Left {
  const uint16_t* data;
  int64_t row;
};

// Rows 2p and 2p + 1 of the matrix are row p, interleaved. Tiles are `down` apart along the depth and `across` along the
// columns.
struct Right {
  const uint16_t* data;
  int64_t row, down, across;
};

// Rows of words, each of which holds a pair, `pitch` words apart.
INLINE Right pairs(const uint16_t* data, int64_t pitch) { return {data, 2 * pitch, 2 * kTile * pitch, 2 * kTile}; }

struct Sums {
  float* data;
  int64_t row;
};

struct Terms {
  const float* data;  // null for zeros
  int64_t row;        // 0 adds the same row to all rows
};

namespace detail {

// One block of C, which the tiles hold at once.
template <int rows, int columns>
INLINE void block_product(int64_t depth, Left a, Right b, Terms in, Sums c) {
  constexpr bool two_rows = rows == 2, two_columns = columns == 2;
  Tiles tiles;
  if (in.data) {
    const float* const lower = in.data + kTile * in.row;
    tiles.load<0>(in.data, in.row);
    if constexpr (two_columns) tiles.load<1>(in.data + kTile, in.row);
    if constexpr (two_rows) tiles.load<2>(lower, in.row);
    if constexpr (two_rows && two_columns) tiles.load<3>(lower + kTile, in.row);
  } else {
    tiles.zero<0>();
    if constexpr (two_columns) tiles.zero<1>();
    if constexpr (two_rows) tiles.zero<2>();
    if constexpr (two_rows && two_columns) tiles.zero<3>();
  }
  for (int64_t p = 0; p < depth; ++p, a.data += kDepth, b.data += b.down) {
    tiles.load<4>(a.data, a.row);
    tiles.load<6>(b.data, b.row);
    tiles.multiply<0, 4, 6>();
    if constexpr (two_columns) tiles.load<7>(b.data + b.across, b.row), tiles.multiply<1, 4, 7>();
    if constexpr (two_rows) tiles.load<5>(a.data + kTile * a.row, a.row), tiles.multiply<2, 5, 6>();
    if constexpr (two_rows && two_columns) tiles.multiply<3, 5, 7>();
  }
  float* const lower = c.data + kTile * c.row;
  tiles.store<0>(c.data, c.row);
  if constexpr (two_columns) tiles.store<1>(c.data + kTile, c.row);
  if constexpr (two_rows) tiles.store<2>(lower, c.row);
  if constexpr (two_rows && two_columns) tiles.store<3>(lower + kTile, c.row);
}

}  // namespace detail

// Counts are in tiles: of 16 rows, 16 columns and a depth of 32.
inline void product(int64_t rows, int64_t columns, int64_t depth, Left a, Right b, Terms in, Sums c) {
  using namespace detail;
  for (int64_t n = 0; n < columns; n += kTileColumns) {
    const bool wide = n + kTileColumns <= columns;
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const bool tall = m + kTileRows <= rows;
      const Left left{a.data + m * kTile * a.row, a.row};
      const Right right{b.data + n * b.across, b.row, b.down, b.across};
      const Terms terms{in.data ? in.data + m * kTile * in.row + n * kTile : nullptr, in.row};
      const Sums sums{c.data + m * kTile * c.row + n * kTile, c.row};
      if (wide && tall) {
        block_product<kTileRows, kTileColumns>(depth, left, right, terms, sums);
      } else if (wide) {
        block_product<1, kTileColumns>(depth, left, right, terms, sums);
      } else if (tall) {
        block_product<kTileRows, 1>(depth, left, right, terms, sums);
      } else {
        block_product<1, 1>(depth, left, right, terms, sums);
      }
    }
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
