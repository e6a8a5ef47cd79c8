// dA by rows and runs of distances, dA^n in (9), from dA by rows and columns.
#pragma once

#include "block.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

// Cell (r, n), of row r and the n-th run counted from the first, is cells[r * row + n * run].
struct Band {
  const float* cells;
  int64_t row, run;
};

// Whether some of the distances of (rows, columns) cells share a row of the tables. runs[c - r] is the run of (r, c).
INLINE bool shares_runs(const int32_t* runs, int64_t rows, int64_t columns) {
  return runs[columns - 1] - runs[1 - rows] < rows + columns - 2;
}

// to[c][r] = from[r][c] by squares of kLanes, with zeros in the padding and in 2 kLanes columns beyond it.
INLINE void transpose_band(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to,
                           int64_t to_pitch) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    for (int64_t r = 0; r < rows + 2 * kLanes; r += kLanes) {
      Vector square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) square[l] = r + l < rows ? load(from + (r + l) * from_pitch + c) : Vector{};
      transpose(square);
      for (int64_t l = 0; l < kLanes; ++l) store(to + (c + l) * to_pitch + r, square[l]);
    }
  }
}

// Sums each row of dA (rows, columns) over the distances of a run: to[n][r], kLanes rows at once. Reads zeros from
// kLanes columns to the left of dA to 2 kLanes to its right. `rows` is at most `pitch`, a multiple of kLanes.
INLINE Band sum_runs(const float* da, int64_t da_pitch, int64_t rows, int64_t columns, const int32_t* runs, float* to,
                     int64_t pitch) {
  const int64_t first = runs[1 - rows], last = runs[columns - 1];
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t start = std::max(1 - rows, 1 - kLanes - r), stop = columns - r;  // distances of these rows
    for (int64_t n = first; n < runs[start]; ++n) store(to + (n - first) * pitch + r, Vector{});
    for (int64_t n = runs[stop - 1] + 1; n <= last; ++n) store(to + (n - first) * pitch + r, Vector{});
    Vector total{};
    for (int64_t e = start; e < stop; e += kLanes) {
      Vector square[kLanes];  // of rows by distances, then of distances by rows
      for (int64_t l = 0; l < kLanes; ++l) {
        square[l] = r + l < rows ? load(da + (r + l) * (da_pitch + 1) + e) : Vector{};
      }
      transpose(square);
      for (int64_t c = 0; c < std::min<int64_t>(stop - e, kLanes); ++c) {
        const Ints same_run = Ints{} - (runs[e + c] == runs[e + c - 1]);
        total = (Vector)((Ints)total & same_run) + square[c];
        store(to + (runs[e + c] - first) * pitch + r, total);
      }
    }
  }
  return {to, 1, pitch};
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
