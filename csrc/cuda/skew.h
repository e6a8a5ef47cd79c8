// The index arithmetic of the kernels: layouts of tiles, bands and expanded tables. Tests call it on the host.
#pragma once

#include "block_sizes.h"
#include "primitives.h"

namespace deberta_fast {

// Permutes columns so that each lane has eight neighbouring ones. Tensor cores give lane 4g + t the columns 2t and 2t +
// 1 of eight, so the four products that make up 32 columns take them in this order: position 8k + 2t + s holds column
// 8t + 2k + s. Shared memory holds columns by position.
ANYWHERE int column_at(int position) {
  return (position & ~31) | (position & 6) << 2 | (position & 24) >> 2 | (position & 1);
}

// Forward's order of columns where each warp makes its position scores alone (scores_alone.h): bits 0 and 3 of a position
// are swapped. So the two columns of a lane in eight are eight apart, and 16 positions hold 16 neighbouring columns.
ANYWHERE int swapped_column(int position) { return (position & ~9) | (position & 8) >> 3 | (position & 1) << 3; }

// ---- Bands: position scores of a tile, and in backward the gradients of its scores.

// The band by rows has the scores of a warp's rows with the rows' table. Distances w are counted from that of row 0 and
// the first column of the tile, so row r at distance w lies under column w + r (6). A tile of n columns brings n new
// distances to each row. Those beyond the tile, the overhang, belong to the next tile. Those before the tile fall on
// the end of the row above, which is written later; row 0 has a margin for them. Tables are read from a multiple of 32
// distances on. If warps own 16 rows, every other warp therefore reads them from the first row of the warp before it
// on, and adds 16 to the distances here. The pitches have the fewest bank conflicts.
constexpr int kRowBandMargin = 32;
ANYWHERE int row_band_pitch(int columns) { return columns + (columns == 64 ? 32 : 40); }
ANYWHERE int row_band(int row, int distance, int columns) { return row * (row_band_pitch(columns) + 1) + distance; }
ANYWHERE int row_band_halves(int rows, int columns) { return kRowBandMargin + rows * row_band_pitch(columns); }

// The band of gradients reverses the skew: row r and column c go to distance c - r of row r. Its first cell is distance
// -32.
ANYWHERE int gradient_band(int row, int column, int columns) {
  return row * (row_band_pitch(columns) - 1) + 32 + column;
}

// The band by columns has the scores of a tile's columns with the columns' table; its cells are (position of the
// column, row of the block). Distances, row minus column, are counted from those of row 0 and the first of 32 columns,
// and run from -32 to the last row. Scores outside of the rows of the block go to margins, which are never read.
ANYWHERE int column_band_pitch(int rows) { return 32 + rows + 32 + 8; }
ANYWHERE int column_band(int position, int distance, int rows) {
  return position * column_band_pitch(rows) + 32 + distance + column_at(position & 31);
}

// ---- Expanded tables, in the order in which the lanes of a warp read them: 16 bytes per lane, D / 8 times per block.

struct TableCell {
  int distance, element;  // indices in a block of 32 distances and in a row of D elements
};

// Returns the cell that a lane finds in one half of a word of its i-th read, for the right operand of the scores X Tᵀ.
ANYWHERE TableCell score_cell(int size, int i, int lane, int word, int half) {
  const int product = i / (size / 32), step = 2 * (i % (size / 32)) + word / 2;
  return {column_at(8 * product + lane / 4), 16 * step + 8 * (word & 1) + 2 * (lane % 4) + half};
}

// Returns the same for the right operand of X Tᵀ with 16 distances in the order of swapped_column.
ANYWHERE TableCell right_cell(int size, int i, int lane, int word, int half) {
  const int steps = size / 16;
  return {16 * (i / steps) + swapped_column(8 * (word / 2) + lane / 4),
          16 * (i % steps) + 8 * (word & 1) + 2 * (lane % 4) + half};
}

// Returns the same for the left operand of T Xᵀ. Its rows are 16 distances, in order.
ANYWHERE TableCell left_cell(int size, int i, int lane, int word, int half) {
  const int steps = size / 16;
  return {16 * (i / steps) + 8 * (word & 1) + lane / 4, 16 * (i % steps) + 8 * (word / 2) + 2 * (lane % 4) + half};
}

// Returns the same for the right operand of the gradients dA T.
ANYWHERE TableCell gradient_cell(int i, int lane, int word, int half) {
  return {8 * word + 2 * (lane % 4) + half, 8 * i + lane / 4};
}

}  // namespace deberta_fast
