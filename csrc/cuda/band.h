// Position scores of near tiles (6): small products with expanded tables, skewed on their way through shared memory.
//
// skew.h orders the table such that a product of 32 distances gives a lane eight neighbouring distances of a row. Row r
// + 1 lies one cell further than row r, so every other row begins at an odd cell, in the middle of a 32-bit word. A
// lane therefore stores eight cells as three words and two halves, and needs no shuffles.
#pragma once

#include "tile.h"

namespace deberta_fast::cuda {

// Where a lane writes eight 16-bit cells: three words and two halves. In an odd row the halves are the first and the
// last cell. In an even row they are the first two or the last two, whichever has fewer bank conflicts.
template <bool even_ends_in_halves>
struct EightHalves {
  char *words, *first, *last;
  uint32_t select;
  bool odd;

  DEVICE EightHalves(char* band, int element) {
    odd = element & 1;
    char* begin = band + kHalf * element;
    if (even_ends_in_halves) {
      words = begin + (odd ? 2 : 0), first = begin + (odd ? 0 : 12), last = begin + 14;
      select = odd ? 0x5432 : 0x3210;
    } else {
      words = begin + (odd ? 2 : 4), first = begin, last = begin + (odd ? 14 : 2);
      select = odd ? 0x5432 : 0x7654;
    }
  }

  DEVICE void store(int offset, const uint32_t (&pairs)[4]) const {
    EACH(k, 3) store_shared_word(words + offset + 4 * k, permute_bytes(pairs[k], pairs[k + 1], select));
    const uint32_t low = even_ends_in_halves && !odd ? pairs[3] : pairs[0];
    const uint32_t high = (even_ends_in_halves || odd ? pairs[3] : pairs[0]) >> 16;
    store_shared_half(first + offset, static_cast<uint16_t>(low));
    store_shared_half(last + offset, static_cast<uint16_t>(high));
  }
};

// Returns x in float16 and the constant 1 in bfloat16. Bands hold scores times b because the range of float16 is small.
template <class T>
DEVICE float band_factor(float x) {
  return 1;
}
template <>
DEVICE float band_factor<Float16>(float x) {
  return x;
}

// Packs the eight cells of row g + 8 half of a fragment.
template <class T>
DEVICE void as_pairs(uint32_t (&pairs)[4], const float (&products)[4][4], int half, float factor) {
  EACH(k, 4) {
    const float b = band_factor<T>(factor);
    pairs[k] = pack<T>(b * products[k][2 * half], b * products[k][2 * half + 1]);
  }
}

// sums += rows · (32 rows of a table)ᵀ. left(a, step) loads elements 16 step to 16 step + 15 of the rows into a.
template <class T, class S, int fragments, class Left>
DEVICE void add_table_scores(float (&sums)[fragments][4][4], const char* block, Left left) {
  constexpr int reads = S::kSize / 32;
  const char* from = opaque(block + 16 * lane());
  EACH(read, reads) {
    uint32_t a[2][fragments][4];
    left(a[0], 2 * read), left(a[1], 2 * read + 1);
    EACH(k, 4) {
      const Vec16 b = load_global(from + 512 * (k * reads + read));
      EACH(f, fragments) {
        multiply_add<T>(sums[f][k], a[0][f], b.x[0], b.x[1]);
        multiply_add<T>(sums[f][k], a[1][f], b.x[2], b.x[3]);
      }
    }
  }
}

// sums += dA · (32 rows of a table), where dA is the first 32 columns of a band of gradients.
template <class T, class S>
DEVICE void add_table_gradients(float (&sums)[S::kFragments][S::kSize / 8][4], const char* band, const char* block) {
  uint32_t a[2][S::kFragments][4];
  EACH(step, 2)
    EACH(f, S::kFragments)
      load_matrices(a[step][f],
                    band + (16 * f + lane() % 16) * S::kRowBandPitch + kHalf * (16 * step + 8 * (lane() / 16)));
  const char* from = opaque(block + 16 * lane());
  EACH(n, S::kSize / 8) {
    const Vec16 b = load_global(from + 512 * n);
    EACH(f, S::kFragments) {
      multiply_add<T>(sums[f][n], a[0][f], b.x[0], b.x[1]);
      multiply_add<T>(sums[f][n], a[1][f], b.x[2], b.x[3]);
    }
  }
}

// The block of a head's expanded table that begins with this distance, a multiple of 32.
template <class S>
DEVICE const char* table_block(const char* table, const Operand& rows, const BlockInfo& block, int distance) {
  constexpr int bytes = kHalf * S::kSize;
  return table + (int64_t{block.head} * rows.blocks * kDistances + (distance - rows.first_distance)) * bytes;
}

// Writes the band by rows of a warp for the tile that begins with this column. `follows` says that the band holds the
// tile before this one, whose overhang is reused. The block must synchronise before the band is read.
template <class T, class S, class Left>
DEVICE void write_row_band(char* band, const Call& call, const BlockInfo& block, const Operand& rows, int first_column,
                           bool follows, Left left) {
  const int before = warp() * S::kWarpRows % kDistances;  // rows of the group of 32 that belong to the warp before
  const int first = first_column - block.first_row - (warp() * S::kWarpRows - before);
  const EightHalves<S::kBlockN != 64> to(band, row_band(lane() / 4, before + 8 * (lane() % 4), S::kBlockN));
  const char* table = table_block<S>(rows.score_table, rows, block, first);
  const auto write = [&](int distance) {
    float sums[S::kFragments][4][4] = {};
    add_table_scores<T, S>(sums, table + distance * kHalf * S::kSize, left);
    EACH(f, S::kFragments)
      EACH(half, 2) {
        uint32_t pairs[4];
        as_pairs<T>(pairs, sums[f], half, call.band_scale);
        to.store(kHalf * row_band(16 * f + 8 * half, distance, S::kBlockN), pairs);
      }
  };
  if (follows) {
    Vec16 overhang[S::kWarpRows / 8];
    const auto cell = [&](int i, int column) {
      return band + (8 * i + lane() / 4) * S::kRowBandPitch + kHalf * (column + 8 * (lane() % 4));
    };
    EACH(i, S::kWarpRows / 8) overhang[i] = load_shared(cell(i, S::kBlockN));
    EACH(i, S::kWarpRows / 8) store_shared(cell(i, 0), overhang[i]);
  } else {
    write(-kDistances);
  }
  sync_warp();
  UNROLL
  for (int distance = 0; distance < S::kBlockN; distance += kDistances) write(distance);
}

// Writes the band by columns of a block. All warps share the work and must synchronise before the band is read. Some
// warps may have one product more than others. In odd turns warps swap their shares in pairs, which balances that.
template <class T, class S>
DEVICE void write_column_band(char* band, const Call& call, const BlockInfo& block, const Operand& columns,
                              const char* column_tile, int first_column, int turn) {
  constexpr int blocks = S::kBlockM / kDistances + 1, groups = S::kBlockN / 32;
  static_assert(S::kWarps % groups == 0, "a warp stays with one group of columns");
  const int share = (warp() ^ (turn & 1) * groups) % S::kWarps, group = share % groups;
  const char* tile = column_tile + 32 * group * S::kPitch;
  // Columns are the rows of this product, so its distances are row minus column.
  const char* table = table_block<S>(columns.score_table, columns, block, block.first_row - first_column - 32 * group);
  const EightHalves<true> to(band, column_band(32 * group + lane() / 4, 8 * (lane() % 4), S::kBlockM));
  // Registers hold the left operand of a warp if it serves several products and is small enough.
  constexpr bool in_registers = S::kSize <= 64 && groups * blocks >= 2 * S::kWarps;
  uint32_t left[in_registers ? S::kSize / 16 : 1][2][4];
  if constexpr (in_registers) {
    EACH(step, S::kSize / 16) load_left<S>(left[step], tile, step);
  }
  for (int item = share / groups; item < blocks; item += S::kWarps / groups) {
    const int distance = kDistances * (item - 1);
    float sums[2][4][4] = {};
    add_table_scores<T, S>(sums, table + distance * kHalf * S::kSize, [&](uint32_t (&a)[2][4], int step) {
      if constexpr (in_registers) {
        EACH(f, 2)
          EACH(w, 4) a[f][w] = left[step][f][w];
      } else {
        load_left<S>(a, tile, step);
      }
    });
    EACH(f, 2)
      EACH(half, 2) {
        uint32_t pairs[4];
        as_pairs<T>(pairs, sums[f], half, call.band_scale);
        const int cell = column_band(16 * f + 8 * half, 0, S::kBlockM) - column_band(0, 0, S::kBlockM);
        to.store(kHalf * (cell + distance), pairs);
      }
  }
}

// Clears the band of an absent term. The block must synchronise before the band is read.
template <class S>
DEVICE void clear_row_band(char* band) {
  for (int i = lane(); i < S::kWarpRows * S::kRowBandPitch / 16; i += 32) store_shared(band + 16 * i, {});
}

template <class S>
DEVICE void clear_column_band(char* band) {
  for (int i = thread(); i < S::kColumnBandBytes / 16; i += S::kThreads) store_shared(band + 16 * i, {});
}

// Sets scores to the sum of both bands times `unscale`, 1 / b.
template <class T, class S>
DEVICE void begin_scores(float (&scores)[S::kFragments][S::kBlockN / 8][4], const char* row_band,
                         const char* column_band, float unscale) {
  const char* by_row_from = row_band + lane() / 4 * S::kRowBandPitch + 16 * (lane() % 4);
  const char* by_column_from = column_band + (lane() / 16 * 8 + lane() % 8) * S::kColumnPitch +
                               kHalf * (32 + warp() * S::kWarpRows + 8 * (lane() / 8 % 2));
  EACH(f, S::kFragments)
    EACH(group, S::kBlockN / 32) {
      Vec16 by_row[2];
      EACH(half, 2)
        by_row[half] = load_shared(by_row_from + (16 * f + 8 * half) * S::kRowBandPitch + kHalf * 32 * group);
      UNROLL
      for (int k = 0; k < 4; k += 2) {
        uint32_t by_column[4];
        load_matrices_transposed(by_column, by_column_from + (32 * group + 8 * k) * S::kColumnPitch + kHalf * 16 * f);
        EACH(w, 4) {
          const uint32_t pair = add_pairs<T>(by_row[w % 2].x[k + w / 2], by_column[w]);
          float (&score)[4] = scores[f][4 * group + k + w / 2];
          score[2 * (w % 2)] = band_factor<T>(unscale) * low<T>(pair);
          score[2 * (w % 2) + 1] = band_factor<T>(unscale) * high<T>(pair);
        }
      }
    }
}

}  // namespace deberta_fast::cuda
