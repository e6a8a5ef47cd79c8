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

// Adds the gradients of runs, (run_count, D), and of far pairs to `sums`, the rows of a table (11), which it first clears
// if `start`.
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
