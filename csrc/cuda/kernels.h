// The kernel launches. Each returns the reason why the launch failed, or null; none synchronises with the device.
#pragma once

#include "arguments.h"
#include "block_sizes.h"
#include "diagonals.h"

namespace deberta_fast::cuda {

// Bytes of shared memory per block of the forward kernel.
int forward_shared_bytes(int padded_size);

// D rounded up to 32, 64, 96 or 128, the sizes that kernels are compiled for.
ANYWHERE int padded_size(int size) { return (size + 31) / 32 * 32; }

// The mask of keys as bits, `words` 32-bit words per row. The bits after the last key are zero. At least two words
// follow that of the last key, because visible_keys reads three words.
struct MaskBits {
  const uint8_t* mask = nullptr;
  int64_t mask_batch = 0, mask_key = 0;
  int batches = 0, keys = 0;
  int64_t words = 0;
  uint32_t* bits = nullptr;
};

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
  int sum_head;                // the index of the first of them in the sums here and of TableCall
  // The sum of t_i x_i over the rows of each warp (10), float32: (heads, far left and far right, query_far_count or
  // key_far_count, D rounded up).
  float *far_query_sums, *far_key_sums;
  int query_far_count, key_far_count;
};
const char* backward_key(const BackwardCall& arguments, void* stream);
// query_far_count or key_far_count: the number of blocks of rows times the warps of a block.
int64_t far_count(const Call& call, const Operand& rows);
// Bytes of shared memory per block of the kernel of backward_key.
int backward_shared_bytes(int padded_size);

// The gradients of the tables K^r (0) and Q^r (1); null if they are not wanted.
struct TableCall {
  BackwardCall backward;
  Diagonals diagonals;
  int32_t* first_share;  // of each diagonal and after the last, in device memory
  float* sums[2];        // dK^e and dQ^e (9) of each share, float32: (heads, shares, kSpan, D rounded up)
  // For backward_by_row.
  void* grad_tables[2];  // (H, table_rows, D), contiguous
  int table_rows, first_slot, query_offset;
  const int32_t* first_of_slot;
};
// Computes dQ, and `sums`.
const char* backward_query(const TableCall& arguments, void* stream);
// Adds the gradients of distances (11) and the sums over far pairs (10) to rows of the grad_tables.
const char* backward_by_row(const TableCall& arguments, void* stream);

// The other kernels read what this launch prepares.
struct Preparation {
  Request request;
  TableCall table = {};  // forward needs only table.backward.call, whose tables have `blocks` blocks each
  // The tables of queries and of keys expanded to one row per distance (4), in the order of skew.h; may be null.
  char *scores[2] = {}, *gradients[2] = {};
  MaskBits mask;
  bool backward = false;     // also lse2, delta and first_share
  int64_t query_blocks = 0;  // thread blocks for lse2 and delta; `prepare` sets it
};
const char* prepare(const Preparation& arguments, void* stream);

}  // namespace deberta_fast::cuda
