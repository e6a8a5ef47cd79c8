// The passes over the GPU. Each returns the reason for which a launch failed, or null; none waits for the device.
#pragma once

#include "arguments.h"
#include "cuts.h"

namespace deberta_fast::cuda {

// Bytes of shared memory that a block of forward takes.
int forward_shared_bytes(int padded_size);

// D rounded up to 32, 64, 96 or 128: what kernels are made for.
constexpr int padded_size(int size) { return (size + 31) / 32 * 32; }

// (4) Tables by distance, in the order of skew.h: bytes of a head are blocks x block_bytes.
struct Expansion {
  const void* table;
  int64_t table_head, table_row;
  const int32_t* slots;
  int reach, first_slot, table_rows;
  int size, padded_size, heads, blocks;  // D, D rounded up as the kernels need it, H, of 32 distances each
  int first_distance;
  int offset, direction;     // delta = offset + direction x distance: -1 for queries, 1 for keys
  char *scores, *gradients;  // gradients may be null
};
const char* expand_table(const Expansion& expansion, void* stream);

// A bit for each key: words of a row are `words`, the two after its last key included, zero beyond it.
struct MaskBits {
  const uint8_t* mask;
  int64_t mask_batch, mask_key;
  int batches, keys;
  int64_t words;
  uint32_t* bits;
};
const char* pack_mask(const MaskBits& mask, void* stream);

// Blocks of so many rows in the first dimension of a launch: find_place finds its way among them.
inline int64_t block_count(const Call& call, const Side& rows, int block_rows) {
  if (call.ends != nullptr) return call.packed_rows / block_rows + call.batches;
  return int64_t{call.batches} * ((rows.length + block_rows - 1) / block_rows);
}

struct ForwardCall {
  Call call;
  Heads output;
  Statistic lse;
};
const char* forward(const ForwardCall& arguments, void* stream);

struct BackwardCall {
  Call call;
  Heads output, grad_output, grad_query, grad_key, grad_value;
  Statistic lse, grad_lse;
  // Of each query (H, statistic_rows): the log-sum-exp in base 2, infinite where no key is seen, and Delta (8).
  float *lse2, *delta;
  int64_t statistic_rows, statistic_batch;  // of a head, of a batch row
  // dA of near pairs, halves: for each block of keys and head, for each near block of queries after the first, four
  // tiles of (128 keys, 32 queries).
  char* near;
  int near_blocks;             // room for so many
  int first_head, head_count;  // heads at work: `near` is not for more
  // Sums over far pairs (10) of each warp, float32: (head_count, left and right, far_count, D rounded up).
  float *far_query_sums, *far_key_sums;
  int query_far_count, key_far_count;
};
const char* backward_delta(const BackwardCall& arguments, void* stream);
const char* backward_key(const BackwardCall& arguments, void* stream);
const char* backward_query(const BackwardCall& arguments, void* stream);
// Blocks of rows times warps: the far_count of a side.
int64_t far_count(const Call& call, const Side& rows);
int backward_shared_bytes(int padded_size);

// Gradients of a table by distance: along diagonal d of the squares lie distances kSquare d - 63 to kSquare d + 63. A
// program sums a share of them; `sums` is (head_count, diagonals, splits, kSpan, D rounded up), float32.
struct TableCall {
  BackwardCall backward;
  bool keys;  // rows are keys, the table is Q^r
  int first_diagonal, diagonals, splits;
  int first_block, last_block;  // near pairs of blocks of 128: column block minus row block
  float* sums;
};
const char* backward_by_distance(const TableCall& arguments, void* stream);

// (11) From distances to rows of the table.
struct RowCall {
  Element element;
  void* grad_table;  // (H, rows, D), contiguous
  int rows, size, padded_size, first_head, head_count;
  float scale;
  const int32_t* first_of_slot;         // the first delta of each row of the whole table, and of the one after the last
  int first_slot, left_row, right_row;  // rows of far pairs
  int offset, direction;                // delta = offset + direction x distance
  int first_diagonal, diagonals, splits;
  const float *sums, *far_sums;
  int far_count;
};
const char* backward_by_row(const RowCall& arguments, void* stream);

}  // namespace deberta_fast::cuda
