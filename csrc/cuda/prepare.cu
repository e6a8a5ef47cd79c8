// Prepares what the other kernels read: tables expanded to one row per distance (4), in the order of skew.h, and masks
// of keys as bits. A block of 128 threads expands 32 distances of a head, or packs four words of a mask.
#include "kernels.h"
#include "tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kThreads = 128;

// Each thread writes 16 bytes at a time.
KERNEL(kThreads, 1) expand_kernel(GRID_CONSTANT const Expansion e) {
  const Request& request = e.request;
  const int size = request.call.size, reads = padded_size(size) / 8, block = block_x(), head = block_y();
  const uint16_t* table = static_cast<const uint16_t*>(e.rows.table.data) + head * e.rows.table.head;
  const int64_t target = (int64_t{head} * e.rows.blocks + block) * reads * 32;
  const auto element = [&](TableCell cell) -> uint32_t {
    const int distance = e.rows.first_distance + block * kDistances + cell.distance;
    const int delta = request.query_offset + e.direction * distance;
    const int slot = request.slots[clamp(delta, -request.reach, request.reach) + request.reach];
    if (e.rows.table.data == nullptr) return 0;  // an absent term adds zeros
    // Rows outside the given table belong to distances that do not occur.
    const int row = clamp(slot - request.first_slot, 0, request.table_rows - 1);
    return cell.element < size ? table[row * e.rows.table.row + cell.element] : 0;
  };
  const auto write = [&](char* to, int item, auto cell_of) {
    Vec16 words;
    for (int w = 0; w < 4; ++w) words.x[w] = element(cell_of(w, 0)) | element(cell_of(w, 1)) << 16;
    store_global(to + 16 * (target + item), words);
  };
  for (int item = thread(); item < reads * 32; item += kThreads) {
    const int read = item / 32, reader = item % 32;
    write(e.scores, item, [&](int w, int half) {
      if (!e.alone) return score_cell(8 * reads, read, reader, w, half);
      return e.direction < 0 ? right_cell(8 * reads, read, reader, w, half) : left_cell(8 * reads, read, reader, w, half);
    });
    if (e.gradients == nullptr) continue;
    write(e.gradients, item, [&](int w, int half) { return gradient_cell(read, reader, w, half); });
  }
}

// A warp packs one word.
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
  return launch<expand_kernel>(expansion.rows.blocks, expansion.request.call.heads, kThreads, 0, stream, expansion);
}

const char* pack_mask(const MaskBits& mask, void* stream) {
  return launch<pack_mask_kernel>(div_up(mask.batches * mask.words, kThreads / 32), 1, kThreads, 0, stream, mask);
}

}  // namespace deberta_fast::cuda
