// What a call computes, as plain structs: the kernels that read them know no torch. Equation numbers are README.md's.
#pragma once

#include "../tensors.h"

namespace deberta_fast {

constexpr int64_t kMaxBlockRows = 128;  // queries that a pass takes at once, at most

// One batch row of a dense call, or one packed sequence.
struct Sequence {
  int64_t batch;        // where its rows lie: in batch row `batch`,
  int64_t first_query;  // from this row on,
  int64_t first_key;
  int64_t queries, keys;  // so many of them
  int64_t first_block;    // its query blocks follow those of the sequences before it
};

struct Attention {
  Element element = Element::float32;
  int64_t heads, size;  // H, D
  float scale;          // s
  int64_t query_offset;
  Heads query, key, value;

  const Sequence* sequences;
  int64_t sequence_count;
  // The queries of a sequence come in stretches of at most kMaxBlockRows. Near and far keys are told apart for a whole
  // stretch, in both passes alike: a score is then the same to the bit in both, and so is what it is divided by.
  int64_t parts;              // of a sequence's queries and keys, in backward; its stretches are a multiple of these
  int64_t blocks_of_stretch;  // that the forward pass makes
  int64_t blocks_per_head;    // of all sequences

  // Rows of the tables: sigma(delta) = slots[clamp(delta, -reach, reach) + reach] - first_slot, within [0, table_rows).
  Table pos_key, pos_query;
  const int32_t* slots;
  int64_t reach, first_slot, table_rows;
  int64_t far_past, far_future;       // sigma is constant for delta >= far_past and for delta <= far_future
  int64_t first_used_row, used_rows;  // the rows that these lengths reach

  // The tables with one row a distance e = j - i, from first_distance on (6): K^e and log2(e) s Q^e, transposed for the
  // products that make scores; a row of Q^e stands where -e would, so that both are read forwards.
  int64_t first_distance, distances, pitch;        // pitch: of the transposed ones, in floats
  int64_t first_reached, reached;                  // of these distances, those of pairs; the others' rows are zero
  float *key_by_distance_t, *query_by_distance_t;  // (H, D, pitch)
  float *key_by_distance, *query_by_distance;      // (H, distances, D rounded up): backward alone

  // True where a query may attend. Strides in bytes, 0 where a dimension is broadcast.
  const uint8_t* mask = nullptr;
  int64_t mask_batch = 0, mask_head = 0, mask_query = 0, mask_key = 0;

  // Dropout (12): probabilities whose random word is below drop_below go, the others are multiplied by keep_scale.
  bool dropout = false;
  uint64_t seed = 0, drop_below = 0;
  float keep_scale = 1;
};

struct Forward {
  Heads output;
  Statistic lse;  // null where nobody wants it
  // The largest score in base 2 and the sum of 2^(Z - peak), for backward; null where nobody wants them.
  Statistic peak{}, total{};
};

struct Backward {
  Heads output, grad_output;
  Statistic lse, grad_lse;  // the second null where nobody differentiates the log-sum-exp
  Heads grad_query, grad_key, grad_value;
  void *grad_pos_key, *grad_pos_query;  // (H, table_rows, D), contiguous; null where nobody wants them

  // Work is cut by shape alone, never by the number of threads, so that sums do not depend on it. An item is a head, a
  // group of sequences, and one of `parts` of their queries; in wave w it meets part (its own + w) of their keys, so
  // that no two items of a wave add to the same gradient.
  int64_t groups;
  const int64_t* group_ends;    // (groups) sequences
  const int64_t* query_starts;  // (sequence_count) rows of all sequences before
  const int64_t* key_starts;
  float *query_sums, *key_sums, *value_sums;  // (rows, H, D rounded up), where parts > 1
  float *pos_key_sums, *pos_query_sums;       // (items, used_rows, D rounded up); null as their gradients are
  Statistic peak{}, total{};                  // forward's, or null: then there is only the log-sum-exp
};

// Numbers [start, stop).
struct Range {
  int64_t start, stop;
};

inline int64_t stretches_of(const Attention& a, int64_t queries) {
  const int64_t most = a.parts * kMaxBlockRows;
  return a.parts * ((queries + most - 1) / most);
}

inline Range rows_of_stretch(const Attention& a, int64_t queries, int64_t stretch) {
  const int64_t stretches = stretches_of(a, queries);
  return {queries * stretch / stretches, queries * (stretch + 1) / stretches};
}

}  // namespace deberta_fast
