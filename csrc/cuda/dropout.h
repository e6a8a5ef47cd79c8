// Dropout (12): which probabilities to keep. Each kernel generates the mask again.
#pragma once

#include "arguments.h"
#include "primitives.h"

namespace deberta_fast::cuda {

// Philox-4x32 with 7 rounds: four words for the keys 8 group to 8 group + 7.
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

// Registers hold seed and origin: kernels spill more if each call reads them.
struct Dropout {
  const Call& call;
  uint64_t seed = 0;
  uint32_t batch_head, first_row = 0, first_group = 0;

  DEVICE Dropout(const Call& call, int batch, int head) : call(call), batch_head(batch * call.heads + head) {
    if (call.seed != nullptr) seed = static_cast<uint64_t>(*call.seed);
    if (const DropoutOrigin* origin = call.origin) {
      batch_head = word(origin->batch_head) + batch * word(origin->heads) + head;
      first_row = word(origin->row), first_group = word(origin->key) / 8;
    }
  }

  DEVICE static uint32_t word(int64_t number) { return static_cast<uint32_t>(number); }

  // Bit mask of the kept keys among the eight neighbouring ones that include `key`.
  DEVICE uint32_t keep_eight(int query, int key) const {
    const uint32_t row = first_row + query, group = first_group + static_cast<uint32_t>(key) / 8;
    const Vec16 words = philox(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), group, row, batch_head);
    uint32_t bits = 0;
    EACH(w, 4) bits |= keeps(words.x[w] << 16) << (2 * w) | keeps(words.x[w]) << (2 * w + 1);
    return bits;
  }

  // The threshold is in the upper half of drop_below, so that the lower half of `word` does not count.
  DEVICE uint32_t keeps(uint32_t word) const { return word >= call.drop_below; }
};

}  // namespace deberta_fast::cuda
