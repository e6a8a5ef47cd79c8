// Scores of a near tile (6) that a warp of 32 rows makes without the other warps: forward at head sizes up to 64.
//
// The rows' term c2p is a band in the warp's own shared memory, as in band.h. The columns' term p2c stays in registers.
// With rows i, columns j and 16 distances e = i - j as the rows of a fragment, the tensor cores give
//
//     T[e, j] = Q^e k_j       and the score of row i needs T[i - j, j]                                            (6)
//
// A lane holds the same columns of T as of the scores, so the skew is a rotation of rows among lanes, and the columns'
// order makes it the same for two columns, which share a word. A warp needs 96 distances for 64 columns; each 16 of them
// meet two or three of the four groups of 16 columns. So p2c costs 1.5 times what Q Kᵀ does. Shared by all warps of a
// block it would cost 1.25 times that, but also a store and a load of each score, and a barrier.
#pragma once

#include "band.h"

namespace deberta_fast::cuda {

// The band by rows in two windows (skew.h).
constexpr int kWindowBandBytes = (kHalf * kWindowBandHalves + 15) / 16 * 16;

template <class T, class S>
struct WindowBand {
  char* band;      // row 0, distance 0
  int window = 0;  // where the present tile begins in a row

  // Writes the position scores of the warp's rows for the tile that begins with this column. `follows` says that the
  // tile before this one was the last to be written; its overhang is reused. The warp must synchronise between the
  // last load and this.
  template <class Left>
  DEVICE void write(const Call& call, const BlockInfo& block, const Operand& rows, int first_column, bool follows,
                    Left left) {
    const int first = first_column - block.first_row - warp() * S::kWarpRows;
    const char* table = table_block<S>(rows.score_table, rows, block, first);
    window = follows ? kWindow - window : 0;
    const EightHalves<false> to(band, window + window_cell(lane() / 4, 8 * (lane() % 4)));
    const auto put = [&](int distance) {
      float sums[S::kFragments][4][4] = {};
      add_table_scores<T, S>(sums, table + distance * kHalf * S::kSize, left);
      EACH(f, S::kFragments)
        EACH(half, 2) {
          uint32_t pairs[4];
          as_pairs<T>(pairs, sums[f], half, call.band_scale);
          to.store(kHalf * (window_cell(16 * f + 8 * half, distance) - window_cell(0, 0)), pairs);
        }
    };
    if (!follows) {
      put(-kDistances);
    } else if (window == 0) {
      const auto cell = [&](int i, int column) {
        return band + kHalf * (window_row(8 * i) + window_row(lane() / 4) + column + 8 * (lane() % 4));
      };
      Vec16 overhang[S::kWarpRows / 8];
      EACH(i, S::kWarpRows / 8) overhang[i] = load_shared(cell(i, 2 * kWindow));
      EACH(i, S::kWarpRows / 8) store_shared(cell(i, 0), overhang[i]);
      sync_warp();
    }
    UNROLL
    for (int distance = 0; distance < S::kBlockN; distance += kDistances) put(distance);
    sync_warp();
  }

  // Loads rows 16 f to 16 f + 15 of 16 columns: words[half][k] has the columns of position 8 k + 2 t and the next one.
  DEVICE void load(uint32_t (&words)[2][2], int f, int column) const {
    uint32_t pairs[4];  // two neighbouring columns: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
    const int row = lane() % 16;
    load_matrices(pairs, band + kHalf * (window_row(16 * f) + window_row(row) + window + column + 8 * (lane() / 16)));
    EACH(half, 2) {
      words[half][0] = permute_bytes(pairs[half], pairs[2 + half], 0x5410);
      words[half][1] = permute_bytes(pairs[half], pairs[2 + half], 0x7632);
    }
  }
};

// scores = position scores + Q Kᵀ. left(a, f, step) gives elements 16 step to 16 step + 15 of fragment f of Q.
template <class T, class S, class Left>
DEVICE void near_scores(float (&scores)[S::kFragments][S::kBlockN / 8][4], const WindowBand<T, S>& band,
                        const Call& call, const BlockInfo& block, const char* keys, int first_column, Left left) {
  static_assert(S::kAlone && S::kWarpRows == 32 && S::kBlockN == kWindow);
  constexpr int steps = S::kSize / 16, groups = S::kBlockN / 16;
  const float factor = band_factor<T>(call.band_scale), unscale = band_factor<T>(1 / call.band_scale);
  const int t = lane() % 4, g = lane() / 4;
  const char* table = opaque(table_block<S>(call.key.score_table, call.key, block,
                                            block.first_row + warp() * S::kWarpRows - first_column - S::kBlockN) +
                             16 * lane());
  // Left operands of T: of the distances 16 part to 16 part + 15, counted from -64.
  uint32_t distances[groups + 2][steps][4];
  const auto load = [&](int part) {
    EACH(step, steps) {
      const Vec16 words = load_global(table + 512 * (part * steps + step));
      EACH(w, 4) distances[part][step][w] = words.x[w];
    }
  };
  load(0), load(1);
  EACH(i, groups) {
    const int n = groups - 1 - i;  // 16 columns, from right to left
    uint32_t key[steps][4];
    EACH(step, steps)
      load_matrices(key[step],
                    keys + (16 * n + 8 * (lane() / 16) + lane() % 8) * S::kPitch + 32 * step + 16 * (lane() / 8 % 2));
    // Of the distances before: the packed scores of their last eight, and the second column's own.
    uint32_t below[2] = {};
    float carry[2] = {};
    EACH(part, 3) {
      const int f = part - 1;  // the rows that these distances complete, if any
      if (part == 2) load(i + 2);
      float sums[2][4] = {};
      EACH(step, steps)
        EACH(k, 2) multiply_add<T>(sums[k], distances[i + part][step], key[step][2 * k], key[step][2 * k + 1]);
      uint32_t words[2][2], content[2][2];
      EACH(k, 2) {
        // A word has T[e, j] and T[e - 8, j + 8], which have the same e + j.
        const uint32_t first = pack<T>(factor * sums[k][0], factor * carry[k]);
        const uint32_t last = pack<T>(factor * sums[k][2], factor * sums[k][1]);
        // Rows move down by 2 t + k. Those of this lane that pass the end of eight rows belong to the next eight.
        const bool wraps = g + 2 * t + k >= 8;
        const int from = 4 * ((g - 2 * t - k) & 7) + t;
        if (f >= 0) {
          words[0][k] = shuffle(wraps ? below[k] : first, from);
          words[1][k] = shuffle(wraps ? first : last, from);
        }
        below[k] = last, carry[k] = sums[k][3];
      }
      if (f < 0) continue;
      band.load(content, f, 16 * n);
      EACH(half, 2)
        EACH(k, 2) {
          const uint32_t pair = add_pairs<T>(content[half][k], words[half][k]);
          scores[f][2 * n + k][2 * half] = unscale * low<T>(pair);
          scores[f][2 * n + k][2 * half + 1] = unscale * high<T>(pair);
        }
      EACH(step, steps) {
        uint32_t q[4];
        left(q, f, step);
        EACH(k, 2) multiply_add<T>(scores[f][2 * n + k], q, key[step][2 * k], key[step][2 * k + 1]);
      }
    }
  }
}

}  // namespace deberta_fast::cuda
