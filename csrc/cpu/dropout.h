// The dropout mask (12): Philox-4x32-7, one call per eight neighbouring keys, kLanes calls at once.
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

// Half of the lanes of (a0, b0, a1, b1, ...): the lower half or the upper one.
template <int first, int... lane>
INLINE Words interleaved(Words a, Words b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, ((first + lane) / 2 + (lane % 2) * kLanes)...);
}
INLINE void interleave(Words a, Words b, Words (&to)[2]) {
  to[0] = interleaved<0>(a, b, detail::AllLanes{}), to[1] = interleaved<kLanes>(a, b, detail::AllLanes{});
}

// Writes the dropout factors, 0 or keep_scale, of a query and the keys [key, key + columns), rounded up to 8 kLanes.
// key is a multiple of 8. sequence: batch row or packed sequence. Inlined, it would slow calls without dropout.
__attribute__((noinline)) static void keep_row(const Attention& a, int64_t sequence, int64_t head, int64_t query,
                                               int64_t key, int64_t columns, float* keep) {
  const DropoutOrigin& origin = a.origin;
  const int64_t first = origin.key / 8 + key / 8, row = origin.row + query;
  const int64_t batch_head = origin.batch_head + sequence * origin.heads + head;
  Words lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  const Ints below = Ints{} + (int32_t)a.drop_below;
  const Vector kept = broadcast(a.keep_scale);
  for (int64_t column = 0; column < columns; column += 8 * kLanes) {
    Words c0 = lane + (uint32_t)(first + column / 8), c1 = Words{} + (uint32_t)row;
    Words c2 = Words{} + (uint32_t)batch_head, c3 = Words{};
    uint32_t k0 = (uint32_t)a.seed, k1 = (uint32_t)(a.seed >> 32);
    for (int round = 0; round < 7; ++round) {
      Words upper0, lower0, upper1, lower1;
      multiply(c0, 0xD2511F53u, upper0, lower0);
      multiply(c2, 0xCD9E8D57u, upper1, lower1);
      c0 = upper1 ^ c1 ^ k0, c1 = lower1, c2 = upper0 ^ c3 ^ k1, c3 = lower0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    // The words in the order of the calls: each of 16 bits then belongs to the next key.
    Words even[2], odd[2], words[2], halves[2];
    interleave(c0, c2, even), interleave(c1, c3, odd);
    float* to = keep + column;
    for (int n = 0; n < 4; ++n) {
      if (n % 2 == 0) interleave(even[n / 2], odd[n / 2], words);
      interleave(words[n % 2] & 0xffffu, words[n % 2] >> 16, halves);
      for (const Words& half : halves) store(to, (Ints)half >= below ? kept : Vector{}), to += kLanes;
    }
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
