// Dropout (12): which probabilities to keep. Each kernel generates the mask again.
#pragma once

#include "arguments.h"
#include "primitives.h"

namespace deberta_fast::cuda {

// Philox-4x32 with 7 rounds: four words for the keys 4 group to 4 group + 3.
DEVICE Vec16 philox(uint32_t seed_low, uint32_t seed_high, uint32_t group, uint32_t query, uint32_t batch_head) {
  uint32_t c[4] = {group, query, batch_head, 0}, k0 = seed_low, k1 = seed_high;
  EACH(round, 7) {
    const uint32_t high0 = high_product(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
    const uint32_t high1 = high_product(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
    c[0] = high1 ^ c[1] ^ k0, c[1] = low1, c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// `from_origin` is known to the compiler, because the reads and additions would cost registers where there is none.
template <bool from_origin>
struct Dropout {
  const Call& call;
  uint32_t batch_head;

  DEVICE Dropout(const Call& call, int batch, int head) : call(call), batch_head(batch * call.heads + head) {
    if (from_origin) batch_head = word(call.origin->batch_head) + batch * word(call.origin->heads) + head;
  }

  DEVICE static uint32_t word(int64_t number) { return static_cast<uint32_t>(number); }

  // The words of the four neighbouring keys that include `key`. Reading seed and origin each time saves registers.
  DEVICE Vec16 words(int query, int key) const {
    const uint64_t seed = static_cast<uint64_t>(*call.seed);
    uint32_t row = query, group = key / 4;
    if (from_origin) row += word(call.origin->row), group += word(call.origin->key) / 4;
    return philox(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), group, row, batch_head);
  }

  DEVICE uint32_t keeps(uint32_t word) const { return word >= call.drop_below; }

  // Bit mask of the kept keys among [key, key + 8), where key is a multiple of eight.
  DEVICE uint32_t keep_eight(int query, int key) const {
    uint32_t bits = 0;
    EACH(group, 2) {
      const Vec16 four = words(query, key + 4 * group);
      EACH(w, 4) bits |= keeps(four.x[w]) << (4 * group + w);
    }
    return bits;
  }
};

}  // namespace deberta_fast::cuda
