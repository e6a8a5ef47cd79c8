// Index arithmetic of the kernels, where a test can reach it: what lies where in a tile, in a band, in a table.
#pragma once

#include "cuts.h"
#include "primitives.h"

namespace deberta_fast {

// Eight neighbouring columns to a lane. Tensor cores give lane 4g + t the columns 2t and 2t + 1 of eight, so the four
// products that make up 32 columns take them in this order: position 8k + 2t + s holds column 8t + 2k + s. Columns lie
// in shared memory by position.
ANYWHERE int column_at(int position) {
  return (position & ~31) | (position & 6) << 2 | (position & 24) >> 2 | (position & 1);
}

// ---- Bands: position scores of a tile, and in backward the gradients of its scores.

// By rows: row r of a warp at distance w from the first one's tile lies under column w + r (6). A tile of 64 columns
// brings 64 new distances to each row; those that lie beyond it are the next tile's, hence the overhang. What lies before
// the tile is the end of the row above, which nobody has written yet; the first row has a margin. Tables are read from a
// multiple of 32 distances on, so where a warp owns 16 rows, `row` counts from the warp before for every other one.
// The pitches are those with the fewest bank conflicts.
constexpr int kRowBandMargin = 32;
ANYWHERE int row_band_pitch(int columns) { return columns + (columns == 64 ? 32 : 40); }
ANYWHERE int row_band(int row, int distance, int columns) { return row * (row_band_pitch(columns) + 1) + distance; }
ANYWHERE int row_band_halves(int rows, int columns) { return kRowBandMargin + rows * row_band_pitch(columns); }

// Its counterpart for gradients: column c of row r goes to distance c - r, counted from -32.
ANYWHERE int gradient_band(int row, int column, int columns) {
  return row * (row_band_pitch(columns) - 1) + 32 + column;
}

// By columns: its cell is (position of the column, row of the block). Distances run from -32 to the last row; what lies
// outside of the rows is written to the margins and never read.
ANYWHERE int column_band_pitch(int rows) { return 32 + rows + 32 + 8; }
ANYWHERE int column_band(int position, int distance, int rows) {
  return position * column_band_pitch(rows) + 32 + distance + column_at(position & 31);
}

// ---- Tables by distance, in the order in which lanes of a warp read them: 16 bytes each, D / 8 times a block.

struct TableCell {
  int distance, element;  // in a block of 32, in a row of D
};

// Right operand of the scores X Tᵀ: word w of what lane l reads the i-th time, and its low or high half.
ANYWHERE TableCell score_cell(int size, int i, int lane, int word, int half) {
  const int product = i / (size / 32), step = 2 * (i % (size / 32)) + word / 2;
  return {column_at(8 * product + lane / 4), 16 * step + 8 * (word & 1) + 2 * (lane % 4) + half};
}

// Right operand of the gradients dA T.
ANYWHERE TableCell gradient_cell(int i, int lane, int word, int half) {
  return {8 * word + 2 * (lane % 4) + half, 8 * i + lane / 4};
}

}  // namespace deberta_fast
