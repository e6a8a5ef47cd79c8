// Sums of the tables' gradients over the distances that share a row (11).
#pragma once

#include "block.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

// Adds the gradients of far pairs, (2, D), to the rows that they read.
inline void add_far_rows(const Attention& a, const float* far, float* sums) {
  for (const Side side : {kPast, kFuture}) {
    const int64_t row = slot_of(a, side == kPast ? a.reach : -a.reach) - a.first_used_row;
    if (0 <= row && row < a.used_rows) {
      add_scaled(1.0f, far + side * a.padded_size, sums + row * a.padded_size, a.padded_size);
    }
  }
}

// Adds the gradients of distances and of far pairs to `sums`, the rows of a table (11), which it first clears if
// `start`. Row t of `by_distance`, (distances, D), belongs to i - j = first + step t; rows outside of `touched` are zero. `row` is memory
// for D floats. Adds sums of kRun rows, because hundreds of distances share the outermost rows of a table and rounding
// grows with the length of a sum.
inline void sum_by_slot(const Attention& a, const float* by_distance, const float* far, int64_t first, int64_t step,
                        Range touched, bool start, float* row, float* sums) {
  const int64_t size = a.padded_size;
  constexpr int64_t kRun = 16;
  if (start) std::fill_n(sums, a.used_rows * size, 0.0f);
  const auto row_of = [&](int64_t slot) { return sums + (slot - a.first_used_row) * size; };
  const int64_t last_distance = a.first_distance + a.distances - 1;
  const int64_t begin =
      step < 0 ? a.first_reached - a.first_distance : last_distance - (a.first_reached + a.reached - 1);
  const int64_t stop = std::min(begin + a.reached, touched.stop);
  for (int64_t t = std::max(begin, touched.start); t < stop;) {
    const int64_t slot = slot_of(a, first + step * t);
    std::fill_n(row, size, 0.0f);
    for (int64_t n = 0; n < kRun && t < stop && slot_of(a, first + step * t) == slot; ++n, ++t) {
      add_scaled(1.0f, by_distance + t * size, row, size);
    }
    add_scaled(1.0f, row, row_of(slot), size);
  }
  add_far_rows(a, far, sums);
}

// The same for gradients of runs, (run_count, D).
inline void sum_by_slot(const Attention& a, const float* by_run, const Runs& runs, const float* far, bool start,
                        float* sums) {
  const int64_t size = a.padded_size;
  if (start) std::fill_n(sums, a.used_rows * size, 0.0f);
  for (int64_t n = 0; n < a.run_count; ++n) {
    add_scaled(1.0f, by_run + n * size, sums + (runs.slots[n] - a.first_used_row) * size, size);
  }
  add_far_rows(a, far, sums);
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
