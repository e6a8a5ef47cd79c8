// The passes over the GPU. Each returns the reason for which a launch failed, or null; none waits for the device.
#pragma once

#include "arguments.h"

namespace deberta_fast::cuda {

// Bytes of shared memory that a block of forward or backward takes, and that a block may have here.
int forward_shared_bytes(int padded_size);
int shared_bytes_limit();

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
  int offset, direction;  // delta = offset + direction x distance: -1 for queries, 1 for keys
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

struct ForwardCall {
  Call call;
  Heads output;
  Statistic lse;
};
const char* forward(const ForwardCall& arguments, void* stream);

}  // namespace deberta_fast::cuda
