// The kernel launches. Each returns the reason why the launch failed, or null; none synchronises with the device.
#pragma once

#include "arguments.h"
#include "block_sizes.h"

namespace deberta_fast::cuda {

// Bytes of shared memory per block of the forward kernel.
int forward_shared_bytes(int padded_size);

// D rounded up to 32, 64, 96 or 128, the sizes that kernels are compiled for.
ANYWHERE int padded_size(int size) { return (size + 31) / 32 * 32; }

// Expands a table to one row per distance (4), in the order of skew.h.
struct Expansion {
  Request request;
  Operand rows;
  int direction;             // delta = query_offset + direction x distance: -1 for queries, 1 for keys
  bool alone;                // scores are in the orders of scores_alone.h
  char *scores, *gradients;  // the results; gradients may be null
};
const char* expand_table(const Expansion& expansion, void* stream);

// Packs the mask of keys into bits, `words` 32-bit words per row. The bits after the last key are zero. At least two
// words follow that of the last key, because visible_keys reads three words.
struct MaskBits {
  const uint8_t* mask;
  int64_t mask_batch, mask_key;
  int batches, keys;
  int64_t words;
  uint32_t* bits;
};
const char* pack_mask(const MaskBits& mask, void* stream);

// The size of a launch's first dimension. find_block maps block_x to a block of rows.
inline int64_t block_count(const Call& call, const Operand& rows, int block_rows) {
  if (call.ends != nullptr) return call.packed_rows / block_rows + call.batches;
  return int64_t{call.batches} * div_up(rows.length, block_rows);
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
  // Per query, (H, statistic_rows): the log-sum-exp in base 2, infinite if the query sees no key, and Delta (8).
  float *lse2, *delta;
  int64_t statistic_rows, statistic_batch;  // per head, per batch row
  // dA of near pairs, 16-bit elements: (blocks of keys, head_count, near_blocks, 4, 128 keys, 32 queries).
  char* near;
  int near_blocks;             // the most blocks of queries near to a block of keys
  int first_head, head_count;  // the heads of this launch
  // The sum of t_i x_i over the rows of each warp (10), float32: (head_count, far left and far right, query_far_count
  // or key_far_count, D rounded up).
  float *far_query_sums, *far_key_sums;
  int query_far_count, key_far_count;
};
const char* backward_delta(const BackwardCall& arguments, void* stream);
const char* backward_key(const BackwardCall& arguments, void* stream);
const char* backward_query(const BackwardCall& arguments, void* stream);
// query_far_count or key_far_count: the number of blocks of rows times the warps of a block.
int64_t far_count(const Call& call, const Operand& rows);
// Bytes of shared memory per block of the kernel of backward_key.
int backward_shared_bytes(int padded_size);

// The gradient of one table. Diagonal d of the squares has the distances kSquare d - 63 to kSquare d + 63. The squares
// of a diagonal are divided into `splits` shares.
struct TableCall {
  BackwardCall backward;
  bool keys;  // rows are keys and the table is Q^r
  int first_diagonal, diagonals, splits;
  int first_block, last_block;  // the range of column block minus row block in near pairs of blocks of 128
  float* sums;                  // (head_count, diagonals, splits, kSpan, D rounded up), float32
  // For backward_by_row.
  void* grad_table;  // (H, table_rows, D), contiguous
  int table_rows, first_slot, query_offset;
  const int32_t* first_of_slot;
};
// Writes dK^e or dQ^e (9) of each share to `sums`.
const char* backward_by_distance(const TableCall& arguments, void* stream);
// Adds the gradients of distances (11) and the sums over far pairs (10) to rows of grad_table.
const char* backward_by_row(const TableCall& arguments, void* stream);

}  // namespace deberta_fast::cuda
