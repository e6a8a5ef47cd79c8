// What the kernels are handed, as plain structs. Equation numbers are csrc/README.md's.
#pragma once

#include "../tensors.h"

namespace deberta_fast::cuda {

// Queries or keys. A kernel owns rows of one side and meets columns of the other; `distance` is column minus row.
struct Side {
  Heads x;         // halves
  int length = 0;  // dense: of every batch row; packed: of the longest sequence
  // Its relative-position table, K^r for queries and Q^r for keys; null where the term is absent.
  Table table;
  // The same with one row a distance, from first_distance on, 16 bytes by 16 bytes in the order of skew.h; of a head
  // after the other, `blocks` blocks of 32 distances each.
  const char *score_table = nullptr, *gradient_table = nullptr;
  int first_distance = 0, blocks = 0;
  // With this side as rows: pairs at a distance of at most near_after read row far_left of both tables, from
  // near_before on row far_right.
  int near_after = 0, near_before = 0, far_left = 0, far_right = 0;
};

// Packed sequences are rows of one batch row, so nothing strides along the batch: all such strides are 0.
struct Call {
  Element element = Element::bfloat16;
  int batches = 0, heads = 0, size = 0;  // packed: sequences; H; D
  const int32_t* ends = nullptr;         // cu_seqlens (batches + 1), or null
  int64_t packed_rows = 0;               // of all sequences
  Side query, key;
  Heads value;
  float scale = 0;                    // s
  float band_scale = 1;               // b: position scores are held as b times themselves, a power of two
  const uint32_t* visible = nullptr;  // a bit for each key, or null; `visible_words` a batch row
  int64_t visible_words = 0, visible_batch = 0;
  bool dropout = false;
  const int64_t* seed = nullptr;  // on the device
  uint32_t drop_below = 0;
  float keep_scale = 1;
};

}  // namespace deberta_fast::cuda
