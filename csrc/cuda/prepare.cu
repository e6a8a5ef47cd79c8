// Prepares what the other kernels read: tables expanded to one row per distance (4), in the order of skew.h, and masks
// of keys as bits; for backward Delta_i = dO_i · O_i - dlse_i (8) of each query, its log-sum-exp in base 2, and the
// first share of each diagonal.
//
// A block of 128 threads handles 16 queries of a head, eight lanes each, or 32 distances of a head, or four words of a
// mask, or all diagonals. It uses no shared memory.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / 8;

template <class T>
DEVICE void write_delta(const BackwardCall& arguments) {
  const Call& call = arguments.call;
  const BlockInfo block = find_block(call, call.query, call.key, kRows);
  if (block.outside) return;
  const int row = block.first_row + thread() / 8;
  const bool exists = row < block.rows;
  float sum = 0;
  if (exists)
    for (int chunk = thread() % 8; 8 * chunk < call.size; chunk += 8) {
      const Vec16 o = load_global(row_address(arguments.output, block, block.base + row) + 16 * chunk);
      const Vec16 d = load_global(row_address(arguments.grad_output, block, block.base + row) + 16 * chunk);
      for (int w = 0; w < 4; ++w) {
        sum = fused_multiply_add(low<T>(o.x[w]), low<T>(d.x[w]), sum);
        sum = fused_multiply_add(high<T>(o.x[w]), high<T>(d.x[w]), sum);
      }
    }
  for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
  if (!exists || thread() % 8 != 0) return;
  const float lse = *statistic_address(arguments.lse, block, block.base + row);
  const int64_t at = statistic_index(arguments, block, row);
  arguments.lse2[at] = lse == -infinity() ? infinity() : lse * static_cast<float>(kLog2e);
  arguments.delta[at] = sum - *statistic_address(arguments.grad_lse, block, block.base + row);
}

// Each thread writes 16 bytes at a time.
DEVICE void expand_table(const Preparation& arguments, bool keys, int block) {
  const Request& request = arguments.request;
  const Call& call = arguments.table.backward.call;
  const Operand& rows = keys ? call.key : call.query;
  const int size = call.size, reads = padded_size(size) / 8, head = block_y();
  const uint16_t* table = static_cast<const uint16_t*>(rows.table.data) + head * rows.table.head;
  const int64_t target = (int64_t{head} * rows.blocks + block) * reads * 32;
  const auto element = [&](TableCell cell) -> uint32_t {
    const int distance = rows.first_distance + block * kDistances + cell.distance;
    const int delta = request.query_offset + (keys ? distance : -distance);
    const int slot = request.slots[clamp(delta, -request.reach, request.reach) + request.reach];
    if (rows.table.data == nullptr) return 0;  // an absent term adds zeros
    // Rows outside the given table belong to distances that do not occur.
    const int row = clamp(slot - request.first_slot, 0, request.table_rows - 1);
    return cell.element < size ? table[row * rows.table.row + cell.element] : 0;
  };
  const auto write = [&](char* to, int item, auto cell_of) {
    Vec16 words;
    for (int w = 0; w < 4; ++w) words.x[w] = element(cell_of(w, 0)) | element(cell_of(w, 1)) << 16;
    store_global(to + 16 * (target + item), words);
  };
  char* scores = keys ? arguments.scores[1] : arguments.scores[0];
  char* gradients = keys ? arguments.gradients[1] : arguments.gradients[0];
  const bool alone = !arguments.backward && padded_size(size) <= kAloneSize;  // scores_alone.h
  for (int item = thread(); item < reads * 32; item += kThreads) {
    const int read = item / 32, reader = item % 32;
    write(scores, item, [&](int w, int half) {
      if (!alone) return score_cell(8 * reads, read, reader, w, half);
      return keys ? left_cell(8 * reads, read, reader, w, half) : right_cell(8 * reads, read, reader, w, half);
    });
    if (gradients == nullptr) continue;
    write(gradients, item, [&](int w, int half) { return gradient_cell(read, reader, w, half); });
  }
}

// A warp packs one word.
DEVICE void pack_mask(const MaskBits& mask, int block) {
  const int64_t item = int64_t{block} * (kThreads / 32) + warp(), batch = item / mask.words, word = item % mask.words;
  const int64_t key = 32 * word + lane();
  const bool exists = batch < mask.batches && key < mask.keys;
  const uint32_t bits = ballot(exists && mask.mask[batch * mask.mask_batch + key * mask.mask_key] != 0);
  if (lane() == 0 && batch < mask.batches) mask.bits[item] = bits;
}

template <class T>
KERNEL(kThreads, 1)
prepare_kernel(GRID_CONSTANT const Preparation arguments) {
  const TableCall& table = arguments.table;
  const Call& call = table.backward.call;
  int block = block_x();
  if (arguments.backward) {
    if (block < arguments.query_blocks) return write_delta<T>(table.backward);
    block -= arguments.query_blocks;
  }
  if (block < call.query.blocks) return expand_table(arguments, false, block);
  block -= call.query.blocks;
  if (block < call.key.blocks) return expand_table(arguments, true, block);
  block -= call.key.blocks;
  if (block_y() > 0) return;
  if (arguments.backward) {
    if (block == 0)
      for (int d = thread(); d <= table.diagonals.count; d += kThreads)
        table.first_share[d] = table.diagonals.first_share(d);
    --block;
  }
  if (block >= 0) pack_mask(arguments.mask, block);
}

}  // namespace

const char* prepare(const Preparation& arguments, void* stream) {
  const Call& call = arguments.table.backward.call;
  Preparation given = arguments;
  given.query_blocks = arguments.backward ? block_count(call, call.query, kRows) : 0;
  const int64_t blocks = given.query_blocks + call.query.blocks + call.key.blocks + arguments.backward +
                         div_up(arguments.mask.batches * arguments.mask.words, kThreads / 32);
  return at_element(call.element, [&](auto type) {
    return launch<prepare_kernel<decltype(type)>>(blocks, call.heads, kThreads, 0, stream, given);
  });
}

}  // namespace deberta_fast::cuda
