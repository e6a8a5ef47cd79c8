// Backward's parts of keys, and its statistics of queries.
#pragma once

#include "block.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

// The keys of part `part` of `parts`. Parts begin at multiples of 16, the most floats of a vector.
inline Range keys_of_part(int64_t keys, int64_t parts, int64_t part) {
  const int64_t step = round_up(div_up(keys, parts), 16), start = std::min(keys, part * step);
  return {start, std::min(keys, start + step)};
}

// For each query of a block, P = 2^(Z - shift) factor.
struct RowStatistics {
  float shift[kMaxBlockRows], factor[kMaxBlockRows], grad_lse[kMaxBlockRows];

  void load(const Attention& a, const Backward& b, const Block& block) {
    const Sequence& sequence = a.sequences[block.sequence];
    const int64_t first = sequence.first_query + block.first;
    const double log_keys = std::log2(static_cast<double>(sequence.keys));
    for (int64_t r = 0; r < block.rows; ++r) {
      const auto given = [&](const Statistic& x) { return *at(x, sequence.batch, block.head, first + r); };
      grad_lse[r] = b.grad_lse.data ? given(b.grad_lse) : 0.0f;
      // The sum of a row, sum_j 2^Z, is 2^row_max row_sum. These two numbers hold it without the rounding of lse. They
      // are used only if they agree with the given lse.
      const float lse = given(b.lse);
      const bool none = lse == -kInfinity;
      double row_max = lse * kLog2e, row_sum = 1, log_sum = 0;
      if (b.row_max.data) {
        const double logarithm = std::log2(static_cast<double>(given(b.row_sum)));
        if (none ? given(b.row_max) == lse : log_sum_exp(given(b.row_max), logarithm) == lse) {
          row_max = given(b.row_max), row_sum = given(b.row_sum), log_sum = logarithm;
        }
      }
      // The shift is closer to most scores than the log-sum-exp, so Z - shift is rounded less. If lse is minus infinity,
      // the shift is 0 and 2^(Z - shift) is 0. Then the factor is 0 for a row without a visible key, and NaN, from
      // row_sum, for a row whose visible scores are all minus infinity.
      shift[r] = none ? 0.0f : static_cast<float>(row_max + log_sum - log_keys);
      factor[r] = static_cast<float>(none ? 0 * row_sum : std::exp2(shift[r] - row_max) / row_sum);
    }
  }
};

}  // namespace deberta_fast::DEBERTA_FAST_ISA
