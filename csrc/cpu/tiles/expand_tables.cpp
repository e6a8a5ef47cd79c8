// Expands the tables to one row per distance e = j - i (6), packed for products: K^e by growing e, and Q^e by growing i -
// j, the order in which it is read. The rows for backward are interleaved in pairs. Distances that no pair has are
// padding with zeros.
#include "scores.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

void expand_tables(const Attention& a, bool with_rows, int64_t begin, int64_t end) {
  const int64_t size = a.padded_size, count = round_up(a.distances, kPaddedRows);
  const int64_t last_distance = a.first_distance + a.distances - 1;
  const Scratch memory(div_up(kPaddedRows * size, 2));
  uint16_t* const rows = reinterpret_cast<uint16_t*>(memory.data());
  // Row t has the distance e = first + step t.
  const auto expand = [&](const Table& table, int64_t head, int64_t first, int64_t step, float* transposed,
                          float* paired) {
    if (table.data == nullptr) return;
    const int64_t start = step > 0 ? a.first_reached - first : first - (a.first_reached + a.reached - 1);
    uint16_t* const packed_rows = reinterpret_cast<uint16_t*>(transposed + head * size * a.pitch);
    uint16_t* const pairs_of_rows =
        with_rows ? reinterpret_cast<uint16_t*>(paired + head * a.distances * size) : nullptr;
    for (int64_t group = 0; group < count; group += kPaddedRows) {
      for (int64_t t = group; t < group + kPaddedRows; ++t) {
        uint16_t* const row = rows + (t - group) * size;
        if (t < start || t >= start + a.reached) {
          std::fill_n(row, size, uint16_t{0});
          continue;
        }
        const int64_t slot = slot_of(a, -(first + step * t));
        copy_row(static_cast<const uint16_t*>(table.data) + head * table.head + slot * table.row, a.size, row, size);
      }
      pack_transposed(rows, kPaddedRows, size, packed_rows + group * size);
      if (with_rows) pair_rows(rows, kPaddedRows, size, pairs_of_rows + group * size);
    }
  };
  for (int64_t head = begin; head < end; ++head) {
    expand(a.pos_key, head, a.first_distance, 1, a.key_by_distance_t, a.key_by_distance);
    expand(a.pos_query, head, last_distance, -1, a.query_by_distance_t, a.query_by_distance);
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
