// The tables expanded to one row per run of distances, K^n and log2(e) s Q^n (6), for one head at a time. Each thread
// expands them for itself, which takes less time than to fetch them from another core.
#pragma once

#include "block.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

// One of the two tables, in the order in which products read it: K^n by growing e = j - i, Q^n by growing i - j.
struct RunTable {
  Runs runs;
  float* columns = nullptr;  // (D, pitch), the right operand of products that make scores
  float* rows = nullptr;     // (runs, D), for backward
};

class ExpandedTables {
 public:
  explicit ExpandedTables(const Attention& a) : key{a.key_runs}, query{a.query_runs}, a_(a) {
    // A product reads whole vectors. An odd number of cache lines per row puts the cells of a column into different
    // cache sets.
    pitch = round_up(a.run_count + kLanes, 16);
    if (pitch / 16 % 2 == 0) pitch += 16;
  }

  void carve(Carver& carver, bool with_rows) {
    const auto carve_one = [&](const Table& given, RunTable& table) {
      if (given.data == nullptr) return;
      table.columns = carver(a_.padded_size * pitch);
      if (with_rows) table.rows = carver(a_.run_count * a_.padded_size);
    };
    carve_one(a_.pos_key, key), carve_one(a_.pos_query, query);
  }

  // Does nothing if they are already those of `head`.
  void expand(int64_t head) {
    if (head == head_) return;
    head_ = head;
    expand(a_.pos_key, 1.0f, key), expand(a_.pos_query, static_cast<float>(a_.scale * kLog2e), query);
  }

  RunTable key, query;
  int64_t pitch;

 private:
  void expand(const Table& given, float scale, const RunTable& table) {
    if (given.data == nullptr) return;
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto row = [&](int64_t n) {
        return static_cast<const typename E::Stored*>(given.data) + head_ * given.head +
               table.runs.slots[n] * given.row;
      };
      transpose_rows<E>(row, a_.run_count, a_.size, scale, table.columns, pitch);
      if (table.rows) copy_rows<E>(row, a_.run_count, a_.size, scale, table.rows, a_.padded_size);
    });
  }

  const Attention& a_;
  int64_t head_ = -1;
};

}  // namespace deberta_fast::DEBERTA_FAST_ISA
