// A call as plain structs, which the kernels read; they do not depend on torch. Equation numbers refer to README.md.
#pragma once

#include <algorithm>

#include "../tensors.h"

namespace deberta_fast {

constexpr int64_t kMaxBlockRows = 128;  // the most queries in a block

// One batch row of a dense call, or one packed sequence.
struct Sequence {
  int64_t batch;                   // the batch row that has its rows
  int64_t first_query, first_key;  // its first rows there
  int64_t queries, keys;           // its lengths
  int64_t first_block;             // its query blocks follow those of the sequences before it
};

// Neighbouring distances that read one row of the tables are a run.
struct Runs {
  const int32_t* runs;   // the number of each distance's run, 0 or 1 more than that of the distance before
  const int32_t* slots;  // (run_count) rows of the tables
  int64_t first;         // the distance of runs[0]
  const int32_t* from(int64_t distance) const { return runs + (distance - first); }
};

struct Attention {
  Element element = Element::float32;
  int64_t heads, size;       // H, D
  int64_t padded_size;       // D rounded up for the kernels, the size of their rows
  float key_gradient_scale;  // of the sums that dK and dK^e are
  float scale;               // s
  int64_t query_offset;
  Heads query, key, value;

  const Sequence* sequences;
  int64_t sequence_count, longest_key;
  // The queries of a sequence are divided into stretches of at most kMaxBlockRows, at multiples of row_step. Forward and backward tell near from
  // far keys for a whole stretch, so that a score has the same bits in both.
  int64_t row_step;
  int64_t parts;              // of a sequence's queries and keys in backward; divides the number of its stretches
  int64_t blocks_of_stretch;  // in forward
  int64_t blocks_per_head;    // of all sequences

  // The row of the tables is sigma(delta) = slots[clamp(delta, -reach, reach) + reach] - first_slot, in [0,
  // table_rows).
  Table pos_key, pos_query;
  const int32_t* slots;
  int64_t reach, first_slot, table_rows;
  int64_t far_past, far_future;       // sigma is constant for delta >= far_past and for delta <= far_future
  int64_t first_used_row, used_rows;  // the rows that distances within these lengths read

  // The tables expanded to one row per distance e = j - i from first_distance on (6): K^e and log2(e) s Q^e, transposed
  // for the products that make scores. Q^e is stored in the order of -e, so that both are read forwards.
  int64_t first_distance, distances, pitch;        // pitch of the transposed tables in floats
  int64_t first_reached, reached;                  // the distances that pairs have; the other rows are zero
  float *key_by_distance_t, *query_by_distance_t;  // (H, D, pitch)
  float *key_by_distance, *query_by_distance;      // (H, distances, D rounded up), only in backward

  // Most kernels expand the tables to one row per run instead, by growing e for K^r and by growing -e for Q^r.
  int64_t run_count;
  Runs key_runs, query_runs;

  // True for visible pairs. Strides in bytes, 0 for broadcast dimensions.
  const uint8_t* mask = nullptr;
  int64_t mask_batch = 0, mask_head = 0, mask_query = 0, mask_key = 0;

  // Dropout (12) drops probabilities whose random bits are below drop_below and multiplies the others by keep_scale.
  bool dropout = false;
  uint64_t seed = 0;
  uint32_t drop_below = 0;
  float keep_scale = 1;
  DropoutOrigin origin{};
};

struct Forward {
  Heads output;
  // lse, and for backward the largest score in base 2 and the sum of 2^(Z - row_max) of each row; null if not wanted.
  Statistic lse, row_max{}, row_sum{};
};

struct Backward {
  Heads output, grad_output;
  Statistic lse, grad_lse;  // grad_lse is null if it is zero
  Heads grad_query, grad_key, grad_value;
  void *grad_pos_key, *grad_pos_query;  // (H, table_rows, D), contiguous; null if not wanted

  // Work is divided by shape, never by the number of threads, so that sums do not depend on it. An item is a head, a
  // group of sequences, and one of `parts` of their queries. In wave w it reads part (its own + w) of their keys, so
  // that no two items of a wave add to the same gradient.
  int64_t groups;
  const int64_t* group_ends;    // (groups) sequences
  const int64_t* query_starts;  // (sequence_count) rows of all sequences before
  const int64_t* key_starts;
  float *query_sums, *key_sums, *value_sums;  // (rows, H, D rounded up) if parts > 1
  float *pos_key_sums, *pos_query_sums;       // (items, used_rows, D rounded up), or null like their gradients
  Statistic row_max{}, row_sum{};             // from forward, or null if only the log-sum-exp is known
};

// Functions here are static: the objects of every instruction set keep their own copy, and the linker must not pick one.
// The row sigma(delta) of the tables. Distances beyond the lengths may lie outside of the given rows.
static inline int64_t slot_of(const Attention& a, int64_t delta) {
  const int64_t slot = a.slots[std::clamp(delta, -a.reach, a.reach) + a.reach] - a.first_slot;
  return std::clamp<int64_t>(slot, 0, a.table_rows - 1);
}

// Numbers [start, stop).
struct Range {
  int64_t start, stop;
};

static inline int64_t stretches_of(const Attention& a, int64_t queries) {
  return a.parts * div_up(div_up(queries, a.row_step), a.parts * (kMaxBlockRows / a.row_step));
}

// Part `part` of `parts` of these rows. Parts begin at multiples of row_step from the first row.
static inline Range part_of(const Attention& a, Range rows, int64_t part, int64_t parts) {
  const int64_t steps = div_up(rows.stop - rows.start, a.row_step);
  const auto cut = [&](int64_t n) { return std::min(rows.start + steps * n / parts * a.row_step, rows.stop); };
  return {cut(part), cut(part + 1)};
}

static inline Range rows_of_stretch(const Attention& a, int64_t queries, int64_t stretch) {
  return part_of(a, {0, queries}, stretch, stretches_of(a, queries));
}

}  // namespace deberta_fast
