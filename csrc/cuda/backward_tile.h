// What the backward passes have in common. Shapes: 128 rows a block, tiles of 32 columns.
#pragma once

#include "band.h"
#include "dropout.h"
#include "kernels.h"

namespace deberta_fast::cuda {

template <int size>
using BackwardShape = Shape<size, (size <= 64 ? 2 : 1), (size <= 64 ? 4 : 8), 32>;

// P from the exponent: at most one, though far scores of queries and of keys are rounded in different places, which in
// float16 can be much. A NaN stays NaN.
DEVICE float probability_of(float exponent) { return exp2_fast(exponent > 0 ? 0 : exponent); }

// ---- dA of near pairs, on its way from the pass that owns keys to those that need it again.

constexpr int kTilesPerBlock = kBackwardRows / 32;
constexpr int kNearTileBytes = kHalf * kBackwardRows * 32;

// Tile of 32 queries, the first of them `query`, of a block of keys; `key_block` counts over all sequences.
DEVICE char* near_tile(const BackwardCall& arguments, int64_t key_block, int head_index, int tile) {
  const int64_t slot = (key_block * arguments.head_count + head_index) * arguments.near_blocks * kTilesPerBlock + tile;
  return arguments.near + slot * kNearTileBytes;
}

// The block of keys that begins with this one, counted as find_place does.
DEVICE int64_t key_block_of(const Call& call, const Place& place, int first_key) {
  const int block = first_key / kBackwardRows;
  if (call.ends != nullptr) return place.base / kBackwardRows + place.batch + block;
  return int64_t{place.batch} * ((call.key.length + kBackwardRows - 1) / kBackwardRows) + block;
}

// Whether a block of keys has any that may be attended to. Where it has none, nobody writes or reads its dA.
DEVICE bool any_visible(const Call& call, const Place& place, int64_t base, int first, int length) {
  return (visible_keys(call, place, base, first, length, 64) |
          visible_keys(call, place, base, first + 64, length, 64)) != 0;
}

// ---- A warp's band of gradients: dA skewed by rows. Tiles that follow one another go through it, each in turn puts its
// dA there, takes the products of 32 distances that have met all of their pairs, and leaves the others to the next one.

template <class T, class S>
struct GradientBand {
  char* band;
  const char* table;  // the distances that this tile completes
  EightHalves<true> to;

  DEVICE GradientBand(char* memory, const Place& place, const Side& rows, int first_column)
      : band(memory), table(nullptr), to(memory, gradient_band(lane() / 4, 8 * (lane() % 4), S::kColumns) - before()) {
    const int first = first_column - place.first_row - (warp() * S::kWarpRows - before());
    if (rows.gradient_table != nullptr) table = table_block<S>(rows.gradient_table, rows, place, first - kDistances);
  }

  static DEVICE int before() { return warp() * S::kWarpRows % kDistances; }

  DEVICE char* cell(int i, int column) const {
    return band + (8 * i + lane() / 4) * S::kRowBandPitch + kHalf * (column + 8 * (lane() % 4));
  }

  // Before the first tile.
  DEVICE void clear() const {
    EACH(i, S::kWarpRows / 8) store_shared(cell(i, 0), {});
    sync_warp();
  }

  // dA of the tile: eight columns of row 16 f + 8 half + lane / 4.
  DEVICE void put(int f, int half, const uint32_t (&pairs)[4]) const {
    to.store(kHalf * gradient_band(16 * f + 8 * half, 0, S::kColumns) - kHalf * gradient_band(0, 0, S::kColumns),
             pairs);
  }

  // Once all is put: sums += dA of 32 distances times their rows.
  DEVICE void take(float (&sums)[S::kFragments][S::kSize / 8][4]) const {
    sync_warp();
    add_table_gradients<T, S>(sums, band, 0, table);
    Words overhang[S::kWarpRows / 8];
    EACH(i, S::kWarpRows / 8) overhang[i] = load_shared(cell(i, S::kColumns));
    sync_warp();
    EACH(i, S::kWarpRows / 8) store_shared(cell(i, 0), overhang[i]);
  }

  // For the tile after the last one: what is left.
  DEVICE void finish(float (&sums)[S::kFragments][S::kSize / 8][4]) const {
    EACH(f, S::kFragments)
      EACH(half, 2) put(f, half, {0, 0, 0, 0});
    take(sums);
  }
};

// ---- Far pairs (10): t_i, the sums of dA along rows, times the far row of the rows' table; and x_i t_i, summed.

// sums += t (far row). The lanes of a row hold parts of t, and all of it afterwards.
template <class T, class S>
DEVICE void add_far_row(float (&sums)[S::kFragments][S::kSize / 8][4], float (&t)[S::kFragments][2], const Call& call,
                        const Place& place, const Side& rows, int far_row) {
  EACH(f, S::kFragments)
    EACH(half, 2) {
      t[f][half] += shuffle_xor(t[f][half], 1);
      t[f][half] += shuffle_xor(t[f][half], 2);
    }
  if (rows.table.data == nullptr) return;
  const char* row =
      static_cast<const char*>(rows.table.data) + kHalf * (place.head * rows.table.head + far_row * rows.table.row);
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

// A warp's part of the sum of x_i t_i over its rows, left (0) or right (1), in `far` of a head of `far_count` parts.
template <class S>
DEVICE float* far_sum(float* far, int far_count, int side) {
  return far + ((int64_t{block_y()} * 2 + side) * far_count + int64_t{block_x()} * S::kWarps + warp()) * S::kSize;
}

// Before anything else, since a block may have no far pairs. Each element belongs to one lane, now and later.
template <class S>
DEVICE void clear_far_sums(float* far, int far_count) {
  for (int side = 0; side < 2; ++side)
    for (int pair = lane(); pair < S::kSize / 2; pair += 32) {
      float* to = far_sum<S>(far, far_count, side) + 2 * pair;
      to[0] = to[1] = 0;
    }
}

// t passes through the padding of the stage's rows.
template <class T, class S>
DEVICE void store_far_sum(float* to, char* stage, const float (&t)[S::kFragments][2], const Heads& x, const Call& call,
                          const Place& place, uint32_t exists) {
  EACH(f, S::kFragments)
    EACH(half, 2)
      store_shared_word(stage + (16 * f + 8 * half + lane() / 4) * S::kPitch + kHalf * S::kSize + 4 * (lane() % 4),
                        float_bits(t[f][half]));
  sync_warp();
  const char* from = row_address(x, place, place.base + place.first_row + warp() * S::kWarpRows);
  for (int pair = lane(); pair < S::kSize / 2; pair += 32) {
    float sum[2] = {};
    for (int row = 0; row < S::kWarpRows; ++row) {
      if (!(exists >> row & 1) || 2 * pair >= call.size) continue;
      const float weight = bits_float(load_shared_word(stage + row * S::kPitch + kHalf * S::kSize));
      const uint32_t both = *reinterpret_cast<const uint32_t*>(from + kHalf * row * x.row + 4 * pair);
      sum[0] = fused_multiply_add(weight, low<T>(both), sum[0]);
      sum[1] = fused_multiply_add(weight, high<T>(both), sum[1]);
    }
    to[2 * pair] = sum[0], to[2 * pair + 1] = sum[1];
  }
}

}  // namespace deberta_fast::cuda
