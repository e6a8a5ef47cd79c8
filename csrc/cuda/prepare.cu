// What the passes want to find: tables with one row a distance (4), in the order of skew.h, and masks of keys as bits.
#include "kernels.h"
#include "tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kThreads = 128;

// A block of 32 distances of a head; every thread writes 16 bytes at a time.
KERNEL(kThreads, 1) expand_kernel(GRID_CONSTANT const Expansion e) {
  const int reads = e.padded_size / 8, block = block_x(), head = block_y();
  const uint16_t* table = static_cast<const uint16_t*>(e.table) + head * e.table_head;
  const int64_t target = (int64_t{head} * e.blocks + block) * reads * 32;
  const auto element = [&](TableCell cell) -> uint32_t {
    const int distance = e.first_distance + block * kDistances + cell.distance;
    int delta = e.offset + e.direction * distance;
    delta = minimum(delta < -e.reach ? -e.reach : delta, e.reach);
    int row = e.slots[delta + e.reach] - e.first_slot;
    row =
        minimum(row < 0 ? 0 : row, e.table_rows - 1);  // rows beyond those given belong to distances that do not occur
    return cell.element < e.size ? table[row * e.table_row + cell.element] : 0;
  };
  for (int item = thread(); item < reads * 32; item += kThreads) {
    const int read = item / 32, reader = item % 32;
    Words words;
    for (int w = 0; w < 4; ++w) {
      const auto at = [&](int half) { return element(score_cell(8 * reads, read, reader, w, half)); };
      words.x[w] = at(0) | at(1) << 16;
    }
    store_global(e.scores + 16 * (target + item), words);
    if (e.gradients == nullptr) continue;
    for (int w = 0; w < 4; ++w) {
      const auto at = [&](int half) { return element(gradient_cell(read, reader, w, half)); };
      words.x[w] = at(0) | at(1) << 16;
    }
    store_global(e.gradients + 16 * (target + item), words);
  }
}

// A warp makes a word.
KERNEL(kThreads, 1) pack_mask_kernel(GRID_CONSTANT const MaskBits mask) {
  const int64_t item = int64_t{block_x()} * (kThreads / 32) + warp(), batch = item / mask.words,
                word = item % mask.words;
  const int64_t key = 32 * word + lane();
  const bool exists = batch < mask.batches && key < mask.keys;
  const uint32_t bits = ballot(exists && mask.mask[batch * mask.mask_batch + key * mask.mask_key] != 0);
  if (lane() == 0 && batch < mask.batches) mask.bits[item] = bits;
}

}  // namespace

const char* expand_table(const Expansion& expansion, void* stream) {
  return launch<expand_kernel>(expansion.blocks, expansion.heads, kThreads, 0, stream, expansion);
}

const char* pack_mask(const MaskBits& mask, void* stream) {
  const int64_t blocks = (mask.batches * mask.words + kThreads / 32 - 1) / (kThreads / 32);
  return launch<pack_mask_kernel>(blocks, 1, kThreads, 0, stream, mask);
}

}  // namespace deberta_fast::cuda
