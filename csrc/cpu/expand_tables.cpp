// K^e = K^r[sigma(-e)] and log2(e) s Q^e, one row a distance e = j - i (6): scores of neighbouring pairs then read
// neighbouring cells, with no look-up. Transposed, (D, distances), as the right-hand sides of products; in rows too for
// backward. Q^e is stored by growing i - j, since its rows are met in that order.
#include "tile.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

void expand_tables(const Attention& a, bool with_rows, int64_t begin, int64_t end) {
  const int64_t size = round_up(a.size, kLanes), last_distance = a.first_distance + a.distances - 1;
  const auto expand = [&](const Table& table, int64_t head, int64_t first, int64_t step, float scale, float* transposed,
                          float* rows) {
    if (table.data == nullptr) return;
    with_element(a.element, [&](auto element) {
      using E = decltype(element);
      const auto row = [&](int64_t t) {  // of i - j = -(first + step t)
        const int64_t slot = slot_of(a, -(first + step * t));
        return static_cast<const typename E::Stored*>(table.data) + head * table.head + slot * table.row;
      };
      transpose_rows<E>(row, a.distances, a.size, scale, transposed + head * size * a.pitch, a.pitch);
      if (with_rows) copy_rows<E>(row, a.distances, a.size, scale, rows + head * a.distances * size, size);
    });
  };
  for (int64_t head = begin; head < end; ++head) {
    expand(a.pos_key, head, a.first_distance, 1, 1.0f, a.key_by_distance_t, a.key_by_distance);
    expand(a.pos_query, head, last_distance, -1, static_cast<float>(a.scale * kLog2e), a.query_by_distance_t,
           a.query_by_distance);
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
