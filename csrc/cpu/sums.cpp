// Stores the gradients that several items of backward have summed.
#include "sums.h"

#include <cstring>

namespace deberta_fast::DEBERTA_FAST_ISA {

void store_sums(const Attention& a, const Backward& b, int64_t begin, int64_t end) {
  const int64_t size = a.padded_size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % a.heads, s = item / a.heads;
    const Sequence& sequence = a.sequences[s];
    const int64_t query = (b.query_starts[s] * a.heads + head * sequence.queries) * size;
    const int64_t key = (b.key_starts[s] * a.heads + head * sequence.keys) * size;
    with_element(a.element, [&](auto element) {
      using E = decltype(element);
      const auto rows = [&](const Heads& heads, int64_t first) {
        return rows_of<E>(heads, sequence.batch, head, first);
      };
      store_rows<E>(b.query_sums + query, size, sequence.queries, a.size, a.scale,
                    rows(b.grad_query, sequence.first_query));
      store_rows<E>(b.key_sums + key, size, sequence.keys, a.size, a.key_gradient_scale,
                    rows(b.grad_key, sequence.first_key));
      store_rows<E>(b.value_sums + key, size, sequence.keys, a.size, 1.0f, rows(b.grad_value, sequence.first_key));
    });
  }
}

void store_table(const Attention& a, const Backward& b, const float* sums, float scale, void* gradient, int64_t begin,
                 int64_t end) {
  const int64_t size = a.padded_size, items = b.groups * a.parts;
  const int64_t stop = a.first_used_row + a.used_rows;
  const Scratch row(size);
  with_element(a.element, [&](auto element) {
    using E = decltype(element);
    auto* to = static_cast<typename E::Stored*>(gradient) + begin * a.table_rows * a.size;
    // The rows that short sequences do not read are zero, which has the same bits in every element type.
    const auto clear = [&](int64_t rows) {
      std::memset(to, 0, rows * a.size * sizeof(*to));
      to += rows * a.size;
    };
    for (int64_t head = begin; head < end; ++head) {
      clear(a.first_used_row);
      for (int64_t used = 0; used < a.used_rows; ++used, to += a.size) {
        std::fill_n(row.data(), size, 0.0f);
        for (int64_t item = head * items; item < (head + 1) * items; ++item) {
          add_scaled(1.0f, sums + (item * a.used_rows + used) * size, row.data(), size);
        }
        store_rows<E>(row.data(), size, 1, a.size, scale, [&](int64_t) { return to; });
      }
      clear(a.table_rows - stop);
    }
  });
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
