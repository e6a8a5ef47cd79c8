// Shared by the backward kernels, which use blocks of 128 rows and tiles of 32 columns.
#pragma once

#include "band.h"
#include "dropout.h"
#include "kernels.h"

namespace deberta_fast::cuda {

template <int size>
using BackwardShape = Shape<size, (size <= 64 ? 2 : 1), (size <= 64 ? 4 : 8), 32>;

// P from its exponent, at most one: the far scores of backward_query and backward_key are rounded differently from
// forward's, by much in float16. A NaN stays NaN.
DEVICE float probability_of(float exponent) { return exp2_fast(exponent > 0 ? 0 : exponent); }

// The index of a query's statistics in lse2 and delta.
DEVICE int64_t statistic_index(const BackwardCall& arguments, const BlockInfo& block, int query) {
  return block.head * arguments.statistic_rows + block.batch * arguments.statistic_batch + block.base + query;
}

// Near and far tiles of 32 columns, cut at pairs of blocks of 128 for queries and keys alike.
template <class S>
DEVICE Segments find_backward_segments(const Operand& rows, const BlockInfo& block) {
  constexpr int tiles = kBackwardRows / S::kBlockN;
  const Segments near = find_segments(rows, block, kBackwardRows, kBackwardRows);
  const int end = (block.columns + S::kBlockN - 1) / S::kBlockN;
  return {minimum(tiles * near.near_begin, end), minimum(tiles * near.near_end, end), end};
}

// Copies a tile of 32 columns, ordered by position (skew.h); columns whose bit is not set become zeros. All threads of
// the block take part.
template <class S>
DEVICE void load_tile(char* tile, const Heads& x, const Call& call, const BlockInfo& block, int first,
                      uint32_t exists) {
  constexpr int chunks = S::kSize / 8, across = chunks <= 4 ? 4 : chunks <= 8 ? 8 : 16, down = S::kThreads / across;
  static_assert(S::kBlockN == 32 && 32 % down == 0, "every thread copies equally many");
  const int item = anew(thread()), chunk = item % across, position = item / across, row = column_at(position);
  if (across > chunks && chunk >= chunks) return;
  const char* from = row_address(x, block, block.base + first + row) + 16 * chunk;
  const int stride = static_cast<int>(kHalf * x.row);  // the host checks that it fits
  const uint32_t wanted = 8 * chunk < call.size ? exists >> row : 0;
  EACH(i, 32 / down) {
    // position < down, a power of two, so position + i * down holds column row + column_at(i * down).
    const bool valid = wanted >> column_at(i * down) & 1;
    const char* address = from + column_at(i * down) * stride;
    copy_async(tile + (position + i * down) * S::kPitch + 16 * chunk,
               valid ? address : static_cast<const char*>(x.data), valid);
  }
}

// load_own_rows, with addresses that are computed again.
template <class S>
DEVICE void load_rows(char* stage, const Heads& x, const Call& call, const BlockInfo& block, uint32_t exists) {
  constexpr int chunks = S::kSize / 8;
  const int own = anew(lane()), first = block.base + block.first_row + warp() * S::kWarpRows;
  const char* from = row_address(x, block, first);
  EACH(i, S::kWarpRows * chunks / 32) {
    const int item = 32 * i + own, row = item / chunks, chunk = item % chunks;
    const bool valid = (exists >> row & 1) && 8 * chunk < call.size;
    const char* address = from + kHalf * row * x.row + 16 * chunk;
    copy_async(stage + row * S::kPitch + 16 * chunk, valid ? address : static_cast<const char*>(x.data), valid);
  }
}

// ---- dA of near pairs, which backward_key writes and the later kernels read.

constexpr int kTilesPerBlock = kBackwardRows / 32;
constexpr int kNearTileBytes = kHalf * kBackwardRows * 32;

// The dA of one block of keys and the tile-th tile of 32 queries near to it; `key_block` counts over all sequences.
DEVICE char* near_tile(const BackwardCall& arguments, int64_t key_block, int head_index, int tile) {
  const int64_t slot = (key_block * arguments.head_count + head_index) * arguments.near_blocks * kTilesPerBlock + tile;
  return arguments.near + slot * kNearTileBytes;
}

// The block of keys that includes this key, numbered as by find_block.
DEVICE int64_t key_block_of(const Call& call, const BlockInfo& block, int key) {
  const int within = key / kBackwardRows;
  if (call.ends != nullptr) return block.base / kBackwardRows + block.batch + within;
  return int64_t{block.batch} * ((call.key.length + kBackwardRows - 1) / kBackwardRows) + within;
}

// Whether a block of keys has a visible key. If not, its dA is neither written nor read.
DEVICE bool any_visible(const Call& call, const BlockInfo& block, int64_t base, int first, int length) {
  return (visible_keys(call, block, base, first, length, 64) |
          visible_keys(call, block, base, first + 64, length, 64)) != 0;
}

// ---- A warp's band of gradients: dA skewed by rows. Each of a run of consecutive tiles stores its dA there,
// multiplies the 32 distances that are complete by their table rows, and leaves the other distances to the next tile.

template <class T, class S>
struct GradientBand {
  char* band;
  const char* table;  // rows of the distances that this tile completes
  EightHalves<true> to;

  DEVICE GradientBand(char* memory, const BlockInfo& block, const Operand& rows, int first_column)
      : band(memory), table(nullptr), to(memory, first_cell(anew(lane()))) {
    const int first = first_column - block.first_row - (warp() * S::kWarpRows - before());
    if (rows.gradient_table != nullptr) table = table_block<S>(rows.gradient_table, rows, block, first - kDistances);
  }

  static DEVICE int first_cell(int lane) { return gradient_band(lane / 4, 8 * (lane % 4), S::kBlockN) - before(); }

  static DEVICE int before() { return warp() * S::kWarpRows % kDistances; }

  DEVICE char* cell(int i, int column) const {
    return band + (8 * i + lane() / 4) * S::kRowBandPitch + kHalf * (column + 8 * (lane() % 4));
  }

  // Call before the first tile.
  DEVICE void clear() const {
    EACH(i, S::kWarpRows / 8) store_shared(cell(i, 0), {});
    sync_warp();
  }

  // Stores eight columns of dA of the row 16 f + 8 half + lane / 4.
  DEVICE void put(int f, int half, const uint32_t (&pairs)[4]) const {
    to.store(kHalf * gradient_band(16 * f + 8 * half, 0, S::kBlockN) - kHalf * gradient_band(0, 0, S::kBlockN), pairs);
  }

  // Call after all of put: sums += dA of 32 distances times their table rows.
  DEVICE void take(float (&sums)[S::kFragments][S::kSize / 8][4]) const {
    sync_warp();
    add_table_gradients<T, S>(sums, band, table);
    Vec16 overhang[S::kWarpRows / 8];
    EACH(i, S::kWarpRows / 8) overhang[i] = load_shared(cell(i, S::kBlockN));
    sync_warp();
    EACH(i, S::kWarpRows / 8) store_shared(cell(i, 0), overhang[i]);
  }

  // Call for the tile after the last one: adds the remaining distances.
  DEVICE void finish(float (&sums)[S::kFragments][S::kSize / 8][4]) const {
    sync_warp();
    EACH(f, S::kFragments)
      EACH(half, 2) put(f, half, {0, 0, 0, 0});
    take(sums);
  }
};

// ---- Far pairs (10): t_i, the sums of dA along rows, times the far row of the rows' table; and the sums of x_i t_i.

// sums += t (far row). The four lanes of a row each hold a part of t, and the sum afterwards.
template <class T, class S>
DEVICE void add_far_row(float (&sums)[S::kFragments][S::kSize / 8][4], float (&t)[S::kFragments][2], const Call& call,
                        const BlockInfo& block, const Operand& rows, int far_row) {
  EACH(f, S::kFragments)
    EACH(half, 2) {
      t[f][half] += shuffle_xor(t[f][half], 1);
      t[f][half] += shuffle_xor(t[f][half], 2);
    }
  if (rows.table.data == nullptr) return;
  const char* row =
      static_cast<const char*>(rows.table.data) + kHalf * (block.head * rows.table.head + far_row * rows.table.row);
  EACH(n, S::kSize / 8) {
    if (8 * n >= call.size) break;
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + 16 * n + 4 * (lane() % 4));
    EACH(f, S::kFragments)
      EACH(half, 2) {
        sums[f][n][2 * half] = fused_multiply_add(t[f][half], low<T>(pair), sums[f][n][2 * half]);
        sums[f][n][2 * half + 1] = fused_multiply_add(t[f][half], high<T>(pair), sums[f][n][2 * half + 1]);
      }
  }
}

// The address in `far` of a warp's sum of x_i t_i over its rows, left (0) or right (1).
template <class S>
DEVICE float* far_sum(const BackwardCall& arguments, float* far, int far_count, int side) {
  const int64_t of_side = (int64_t{block_y() + arguments.sum_head} * 2 + side) * far_count;
  return far + (of_side + int64_t{block_x()} * S::kWarps + anew(thread()) / 32) * S::kSize;
}

// Call first, because a block may have no far pairs. The same lane writes an element here and in store_far_sum.
template <class S>
DEVICE void clear_far_sums(const BackwardCall& arguments, float* far, int far_count) {
  for (int side = 0; side < 2; ++side)
    for (int pair = lane(); pair < S::kSize / 2; pair += 32) {
      float* to = far_sum<S>(arguments, far, far_count, side) + 2 * pair;
      to[0] = to[1] = 0;
    }
}

// Writes the sum of x_i t_i if there is a table. The stage holds the rows, and zeros for those that do not exist; its
// copies have landed. t is exchanged through the padding of the rows.
template <class T, class S>
DEVICE void store_far_sum(float* to, char* stage, const float (&t)[S::kFragments][2], const Operand& rows,
                          uint32_t exists) {
  EACH(f, S::kFragments)
    EACH(half, 2) {
      const int row = 16 * f + 8 * half + lane() / 4;
      // A pair of a row that does not exist may be NaN.
      store_shared_word(stage + row * S::kPitch + kHalf * S::kSize + 4 * (lane() % 4),
                        exists >> row & 1 ? float_bits(t[f][half]) : 0);
    }
  sync_warp();
  if (rows.table.data != nullptr)
    for (int pair = lane(); pair < S::kSize / 2; pair += 32) {
      float sum[2] = {};
      EACH(row, S::kWarpRows) {
        const float weight = bits_float(load_shared_word(stage + row * S::kPitch + kHalf * S::kSize));
        const uint32_t both = load_shared_word(stage + row * S::kPitch + 4 * pair);
        sum[0] = fused_multiply_add(weight, low<T>(both), sum[0]);
        sum[1] = fused_multiply_add(weight, high<T>(both), sum[1]);
      }
      to[2 * pair] = sum[0], to[2 * pair + 1] = sum[1];
    }
  sync_warp();
}

}  // namespace deberta_fast::cuda
