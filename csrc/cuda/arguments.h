// The arguments of the kernels, as plain structs. Equation numbers refer to csrc/README.md.
#pragma once

#include "../tensors.h"

namespace deberta_fast::cuda {

// Queries or keys. A kernel owns rows of one operand and iterates over columns of the other; a distance is column minus
// row.
struct Operand {
  Heads x;         // 16-bit elements
  int length = 0;  // dense: of every batch row; packed: of the longest sequence
  // Relative-position table, K^r for queries and Q^r for keys; null if the term is absent.
  Table table;
  // The table expanded to one row per distance from first_distance on, in the order of skew.h, in chunks of 16 bytes.
  // Each head has `blocks` blocks of 32 distances.
  const char *score_table = nullptr, *gradient_table = nullptr;
  int first_distance = 0, blocks = 0;
  // With this operand as rows, pairs at a distance <= near_after read row far_left of both tables, and pairs at a
  // distance >= near_before read row far_right.
  int near_after = 0, near_before = 0, far_left = 0, far_right = 0;
};

// Packed sequences are stretches of one batch row, so their batch strides are 0.
struct Call {
  Element element = Element::bfloat16;
  int batches = 0, heads = 0, size = 0;  // batch rows or packed sequences, H, D
  const int32_t* ends = nullptr;         // cu_seqlens (batches + 1), or null
  int64_t packed_rows = 0;               // of all sequences
  Operand query, key;
  Heads value;
  float scale = 0;                    // s
  float band_scale = 1;               // b: bands hold b times the position scores; a power of two
  const uint32_t* visible = nullptr;  // bit mask of visible keys, `visible_words` words per batch row, or null
  int64_t visible_words = 0, visible_batch = 0;
  bool dropout = false;
  const int64_t* seed = nullptr;          // in device memory
  const DropoutOrigin* origin = nullptr;  // in device memory; null if it is zero
  uint32_t drop_below = 0;                // the threshold times 2^16
  float keep_scale = 1;
};

// A call as the operator receives it: `call` lacks the expanded tables, the far rows and the mask bits, which are made
// from the other members.
struct Request {
  Call call;
  const int32_t* slots = nullptr;  // sigma over [-reach, reach], in device memory
  int reach = 0, first_slot = 0, table_rows = 0;
  int far_past = 0, far_future = 0;  // sigma is constant for delta >= far_past and for delta <= far_future
  int past_row = 0, future_row = 0;  // and has these values there
  int query_offset = 0;
  // The first delta of each row of the whole table, and of the row after its last, in device memory.
  const int32_t* first_of_slot = nullptr;
  const uint8_t* mask = nullptr;  // of keys; strides in bytes
  int64_t mask_batch = 0, mask_key = 0;
};

}  // namespace deberta_fast::cuda
