// Expands the tables to K^e = K^r[sigma(-e)] and log2(e) s Q^e, one row per distance e = j - i (6), so that
// neighbouring pairs read neighbouring cells without a lookup. They are transposed, (D, distances), as right operands
// of products; for backward also in rows. Q^e is stored by growing i - j, the order in which it is read. Distances that
// no pair has are padding with zeros.
#include <cstring>

#include "tile.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

void expand_tables(const Attention& a, bool with_rows, int64_t begin, int64_t end) {
  const int64_t size = a.padded_size, last_distance = a.first_distance + a.distances - 1;
  // Row t has the distance e = first + step t.
  const auto expand = [&](const Table& table, int64_t head, int64_t first, int64_t step, float scale, float* transposed,
                          float* rows) {
    if (table.data == nullptr) return;
    const int64_t start = step > 0 ? a.first_reached - first : first - (a.first_reached + a.reached - 1);
    transposed += head * size * a.pitch, rows += with_rows ? head * a.distances * size : 0;
    if (a.reached < a.distances) {
      std::memset(transposed, 0, size * a.pitch * sizeof(float));
      if (with_rows) std::memset(rows, 0, size * a.distances * sizeof(float));
    }
    with_element(a.element, [&](auto element) {
      using E = decltype(element);
      const auto row = [&](int64_t t) {
        const int64_t slot = slot_of(a, -(first + step * (start + t)));
        return static_cast<const typename E::Stored*>(table.data) + head * table.head + slot * table.row;
      };
      transpose_rows<E>(row, a.reached, a.size, scale, transposed + start, a.pitch);
      if (with_rows) copy_rows<E>(row, a.reached, a.size, scale, rows + start * size, size);
    });
  };
  for (int64_t head = begin; head < end; ++head) {
    expand(a.pos_key, head, a.first_distance, 1, 1.0f, a.key_by_distance_t, a.key_by_distance);
    expand(a.pos_query, head, last_distance, -1, static_cast<float>(a.scale * kLog2e), a.query_by_distance_t,
           a.query_by_distance);
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
