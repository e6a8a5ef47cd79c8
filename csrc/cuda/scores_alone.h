// Scores of a near tile (6) that a warp of 32 rows makes without the other warps: forward at head sizes up to 64.
//
// The tensor cores give, for rows i, columns j and distances e = j - i,
//
//     C[i, e] = q_i K^e      and the score of row i and column j needs C[i, j - i]
//     T[e, j] = Q^e k_j      and the score of row i and column j needs T[j - i, j]                                (6)
//
// Both stay in registers. A lane holds a part of C's rows and of T's columns, and so does the lane that needs a score. So
// the skew of C moves columns among the four lanes of a row, and the skew of T moves rows among the eight lanes of a pair
// of columns: one shuffle for each two scores. Columns are in the order of swapped_column, by which the two scores of a
// word are eight columns apart. Distances that pass the end of eight columns or rows belong to the next eight, which are
// in another register of the same lane.
//
// A tile brings 64 new distances to each row; C of the 32 before them is kept. T is made again for each tile: a warp
// needs 96 distances, each 16 of which meet two or three of the four groups of 16 columns. So p2c costs 1.5 times what
// Q Kᵀ does. Shared by the warps of a block it would cost 1.25 times that, but also stores, loads and a barrier.
#pragma once

#include "band.h"

namespace deberta_fast::cuda {

// Multiplies by the factor in float16 only: bfloat16 needs none.
template <class T>
DEVICE uint32_t pack_scaled(float low, float high, float factor) {
  return pack<T>(band_factor<T>(factor) * low, band_factor<T>(factor) * high);
}

template <class T, class S>
struct NearScores {
  static constexpr int kSteps = S::kSize / 16, kGroups = S::kBlockN / 16;
  static_assert(S::kAlone && S::kWarpRows == 32);

  const Call& call;
  // Packed C of the last 16 columns of fragment 0, and of the last 16 and the 16 before these of fragment 1. Words are
  // those of rows 8 half and of position 8 k.
  uint32_t before[3][2][2];
  uint32_t distances[2][kSteps][4];  // left operands of T: 32 distances
  int distance = 0;                  // of row 0 and the first column of the tile

  // ---- The lanes between which scores move.

  static DEVICE int t() { return lane() % 4; }
  static DEVICE int g() { return lane() / 4; }

  // Whether a score of this lane in position 8 k passes the end of eight columns (C) or rows (T).
  static DEVICE bool wraps(int k) { return g() + 2 * t() + k >= 8; }

  // Returns a block that tells table_block the head.
  static DEVICE BlockInfo here() {
    BlockInfo block;
    block.head = block_y();
    return block;
  }

  // ---- c2p.

  // Computes C of the 16 distances from this one on.
  template <class Left>
  DEVICE void content_to_position(uint32_t (&words)[2][2][2], int distance, Left left) const {
    const char* table =
        opaque(table_block<S>(call.query.score_table, call.query, here(), distance) + 16 * anew(lane()));
    float sums[2][2][4] = {};
    EACH(step, kSteps) {
      const Vec16 b = load_global(table + 512 * step);
      EACH(f, 2) {
        uint32_t q[4];
        left(q, f, step);
        EACH(k, 2) multiply_add<T>(sums[f][k], q, b.x[2 * k], b.x[2 * k + 1]);
      }
    }
    EACH(f, 2)
      EACH(half, 2)
        EACH(k, 2) words[f][half][k] = pack_scaled<T>(sums[f][k][2 * half], sums[f][k][2 * half + 1], call.band_scale);
  }

  // Moves C to the scores of rows 8 half. `last` has the columns in which the rows' diagonal begins, `first` the 16
  // columns before these.
  DEVICE void skew(uint32_t (&scores)[2], const uint32_t (&first)[2], const uint32_t (&last)[2], int half) const {
    uint32_t moved[2];
    EACH(k, 2) moved[k] = permute_bytes(first[k], last[k], 0x7654 - 0x2222 * (half + (wraps(k) ? 1 : 0)));
    const bool odd = g() & 1;
    EACH(k, 2) scores[k] = shuffle(odd ? moved[1 - k] : moved[k], 4 * g() + ((2 * t() + k - g()) & 7) / 2);
  }

  // Takes 16 new columns and returns the c2p scores of the rows and these columns.
  DEVICE void take(uint32_t (&scores)[2][2][2], const uint32_t (&words)[2][2][2]) {
    EACH(half, 2) {
      skew(scores[0][half], before[0][half], words[0][half], half);
      skew(scores[1][half], before[2][half], before[1][half], half);
    }
    keep(words);
  }

  DEVICE void keep(const uint32_t (&words)[2][2][2]) {
    EACH(half, 2)
      EACH(k, 2) {
        before[2][half][k] = before[1][half][k];
        before[1][half][k] = words[1][half][k], before[0][half][k] = words[0][half][k];
      }
  }

  // ---- Scores.

  // Call at the beginning of a tile with the distance of its first column and row 0. `follows` says that the tile before this one was the last. left(a, f, step) gives
  // elements 16 step to 16 step + 15 of fragment f of Q.
  template <class Left>
  DEVICE void begin(int first, bool follows, Left left) {
    distance = first;
    if (!follows)
      EACH(i, 2) {
        uint32_t words[2][2][2];
        content_to_position(words, distance - 32 + 16 * i, left);
        keep(words);
      }
    load(1, kGroups + 1), load(0, kGroups);
  }

  // Loads the left operand of T for the distances 16 part to 16 part + 15, row minus column, counted from -64.
  DEVICE void load(int slot, int part) {
    const char* table = table_block<S>(call.key.score_table, call.key, here(), -distance - S::kBlockN);
    const char* from = opaque(table + 16 * anew(lane()));
    EACH(step, kSteps) {
      const Vec16 words = load_global(from + 512 * (part * kSteps + step));
      EACH(w, 4) distances[slot][step][w] = words.x[w];
    }
  }

  // scores = position scores + Q Kᵀ for the columns 16 n to 16 n + 15 of the tile, in the order of n. They are products
  // 2 i and 2 i + 1 of half a tile: i = n % 2, which the compiler knows.
  template <class Left>
  DEVICE void multiply(float (&scores)[2][S::kBlockN / 16][4], int i, int n, const char* keys, Left left) {
    uint32_t words[2][2][2], c2p[2][2][2], key[kSteps][4];
    content_to_position(words, distance + 16 * n, left);
    take(c2p, words);
    EACH(step, kSteps)
      load_matrices(key[step],
                    keys + (16 * n + 8 * (lane() / 16) + lane() % 8) * S::kPitch + 32 * step + 16 * (lane() / 8 % 2));
    // These are kept from the 16 distances after: the packed scores of the last eight, and the first column's of the
    // first eight.
    uint32_t last[2] = {};
    float own[2] = {};
    EACH(part, 3) {
      const int slot = (kGroups + 1 - i - part) % 2;
      if (part == 1) load(1 - slot, kGroups - 1 - n);
      float sums[2][4] = {};
      EACH(step, kSteps)
        EACH(k, 2) multiply_add<T>(sums[k], distances[slot][step], key[step][2 * k], key[step][2 * k + 1]);
      uint32_t p2c[2][2];
      EACH(k, 2) {
        // A word has T[e, j] and T[e - 8, j + 8], which belong to the same row.
        const uint32_t middle = pack_scaled<T>(own[k], sums[k][3], call.band_scale);
        const uint32_t below = pack_scaled<T>(sums[k][2], sums[k][1], call.band_scale);
        const int from = 4 * ((g() - 2 * t() - k) & 7) + t();
        if (part > 0) {
          p2c[0][k] = shuffle(wraps(k) ? below : middle, from);
          p2c[1][k] = shuffle(wraps(k) ? middle : last[k], from);
        }
        last[k] = below, own[k] = sums[k][0];
      }
      if (part == 0) continue;
      const int f = 2 - part, product = 2 * i;
      EACH(half, 2)
        EACH(k, 2) {
          const uint32_t pair = add_pairs<T>(c2p[f][half][k], p2c[half][k]);
          scores[f][product + k][2 * half] = band_factor<T>(1 / call.band_scale) * low<T>(pair);
          scores[f][product + k][2 * half + 1] = band_factor<T>(1 / call.band_scale) * high<T>(pair);
        }
      EACH(step, kSteps) {
        uint32_t q[4];
        left(q, f, step);
        EACH(k, 2) multiply_add<T>(scores[f][product + k], q, key[step][2 * k], key[step][2 * k + 1]);
      }
    }
  }
};

}  // namespace deberta_fast::cuda
