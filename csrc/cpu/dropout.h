// The dropout mask (12): Philox-4x32-7, one call per four neighbouring keys, kLanes calls at once.
#pragma once

#include "vector.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

// Computes the upper and lower words of a * b in each lane.
INLINE void multiply(Words a, uint32_t b, Words& upper, Words& lower) {
  typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));
  // Products of the even lanes and of the odd ones, 64 bits wide in place.
  const Longs even = ((Longs)a & 0xffffffffull) * (uint64_t)b, odd = ((Longs)a >> 32) * (uint64_t)b;
  upper = (Words)((even >> 32) | (odd & 0xffffffff00000000ull));
  lower = (Words)((even & 0xffffffffull) | (odd << 32));
}

// Writes the dropout factors, 0 or 1 / (1 - p), of a query and the keys [key, key + columns), rounded up to 4 kLanes.
// key is a multiple of 4. sequence: batch row or packed sequence.
inline void keep_row(const Attention& a, int64_t sequence, int64_t head, int64_t query, int64_t key, int64_t columns,
                     float* keep) {
  const DropoutOrigin& origin = a.origin;
  const int64_t first = origin.key / 4 + key / 4, row = origin.row + query;
  const int64_t batch_head = origin.batch_head + sequence * origin.heads + head;
  Words lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  const bool none = a.drop_below > 0xffffffffull;
  const Words below = Words{} + (uint32_t)(none ? 0 : a.drop_below);
  const float kept = none ? 0.0f : a.keep_scale;
  for (int64_t column = 0; column < columns; column += 4 * kLanes) {
    Words c0 = lane + (uint32_t)(first + column / 4), c1 = Words{} + (uint32_t)row;
    Words c2 = Words{} + (uint32_t)batch_head, c3 = Words{};
    uint32_t k0 = (uint32_t)a.seed, k1 = (uint32_t)(a.seed >> 32);
    for (int round = 0; round < 7; ++round) {
      Words upper0, lower0, upper1, lower1;
      multiply(c0, 0xD2511F53u, upper0, lower0);
      multiply(c2, 0xCD9E8D57u, upper1, lower1);
      c0 = upper1 ^ c1 ^ k0, c1 = lower1, c2 = upper0 ^ c3 ^ k1, c3 = lower0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const Words words[4] = {c0, c1, c2, c3};
    float four[4][kLanes];
    for (int w = 0; w < 4; ++w) store(four[w], words[w] >= below ? broadcast(kept) : Vector{});
    for (int l = 0; l < kLanes; ++l) {
      for (int w = 0; w < 4; ++w) keep[column + 4 * l + w] = four[w][l];
    }
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
