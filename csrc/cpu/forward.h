// Forward's blocks of queries, and what it writes for them.
#pragma once

#include "block.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

// Calls begin_head(sequence, head) before the first block of a head and sequence, and run(block, stretch) for query
// blocks [begin, end) of heads * blocks_per_head.
template <class BeginHead, class Run>
void for_each_block(const Attention& a, int64_t begin, int64_t end, BeginHead begin_head, Run run) {
  const Sequence* sequence = nullptr;
  int64_t head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item % a.blocks_per_head;
    const auto before = [](int64_t block, const Sequence& s) { return block < s.first_block; };
    const Sequence* next = std::upper_bound(a.sequences, a.sequences + a.sequence_count, n, before) - 1;
    const int64_t stretch = (n - next->first_block) / a.blocks_of_stretch;
    const int64_t share = (n - next->first_block) % a.blocks_of_stretch;
    const Range all = rows_of_stretch(a, next->queries, stretch);
    const Range rows = part_of(a, all, share, a.blocks_of_stretch);
    if (rows.start == rows.stop) continue;
    if (next != sequence || item / a.blocks_per_head != head) {
      sequence = next, head = item / a.blocks_per_head;
      begin_head(*sequence, head);
    }
    const auto block_of = [&](const Range& r) {
      return Block{head, sequence - a.sequences, r.start, r.stop - r.start, r.start + a.query_offset};
    };
    run(block_of(rows), block_of(all));
  }
}

// Divides the output, (rows, D), by the row sums, and stores it with the statistics.
inline void finish(const Attention& a, const Forward& f, const Block& block, const VisibleKeys& visible, float* row_max,
                   float* row_sum, float* output) {
  const Sequence& sequence = a.sequences[block.sequence];
  const int64_t size = a.padded_size, first = sequence.first_query + block.first;
  for (int64_t r = 0; r < block.rows; ++r) {
    float* const out = output + r * size;
    const bool some = row_sum[r] > 0 || visible.seen_by(a, block.first + r);
    if (!some) {  // the query sees no key; it may itself be NaN
      std::fill_n(out, size, 0.0f);
      row_max[r] = -kInfinity, row_sum[r] = 0;
    }
    const float lse = log_sum_exp(row_max[r], std::log2(static_cast<double>(row_sum[r])));
    if (some && row_sum[r] == 0) row_sum[r] = kNaN;  // all visible scores are minus infinity
    const float inverse = some ? 1 / row_sum[r] : 0.0f;
    for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(out + d) * inverse);
    const auto write = [&](const Statistic& to, float x) {
      if (to.data) *at(to, sequence.batch, block.head, first + r) = x;
    };
    write(f.lse, lse), write(f.row_max, row_max[r]), write(f.row_sum, row_sum[r]);
  }
  with_element(a.element, [&](auto element) {
    using E = decltype(element);
    store_rows<E>(output, size, block.rows, a.size, 1.0f, rows_of<E>(f.output, sequence.batch, block.head, first));
  });
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
