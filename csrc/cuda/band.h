// Position scores of near tiles (6): small products with tables by distance, skewed on their way through shared memory.
//
// A product of 32 distances gives a lane eight neighbouring ones of a row, as skew.h orders the table. Row r + 1 lies one
// cell further than row r, so every other row begins at an odd half: three words and two halves then, and no shuffles.
#pragma once

#include "tile.h"

namespace deberta_fast::cuda {

// Where a lane writes eight halves, by whether it begins at an odd one.
struct EightHalves {
  char *words, *single, *last;
  uint32_t select;
  bool odd;

  DEVICE EightHalves(char* band, int element) {
    odd = element & 1;
    char* first = band + kHalf * element;
    words = first + (odd ? 2 : 0), single = first + (odd ? 0 : 12), last = first + 14;
    select = odd ? 0x5432 : 0x3210;
  }

  DEVICE void store(int offset, const uint32_t (&pairs)[4]) const {
    UNROLL
    for (int k = 0; k < 3; ++k)
      store_shared_word(words + offset + 4 * k, permute_bytes(pairs[k], pairs[k + 1], select));
    store_shared_half(single + offset, static_cast<uint16_t>(odd ? pairs[0] : pairs[3]));
    store_shared_half(last + offset, static_cast<uint16_t>(pairs[3] >> 16));
  }
};

// Float16 alone is short of room: a band holds b times its scores. Elsewhere the factor costs nothing.
template <class T>
DEVICE float band_factor(float x) {
  return 1;
}
template <>
DEVICE float band_factor<Float16>(float x) {
  return x;
}

// The eight halves of row g + 8 half of a fragment.
template <class T>
DEVICE void as_pairs(uint32_t (&pairs)[4], const float (&products)[4][4], int half, float factor) {
  UNROLL
  for (int k = 0; k < 4; ++k) {
    const float b = band_factor<T>(factor);
    pairs[k] = pack<T>(b * products[k][2 * half], b * products[k][2 * half + 1]);
  }
}

// sums += rows · (32 rows of a table)ᵀ. left(a, step) gives the left operands.
template <class T, class S, int fragments, class Left>
DEVICE void add_table_scores(float (&sums)[fragments][4][4], const char* block, Left left) {
  constexpr int reads = S::kSize / 32;
  UNROLL
  for (int read = 0; read < reads; ++read) {
    uint32_t a[2][fragments][4];
    left(a[0], 2 * read), left(a[1], 2 * read + 1);
    UNROLL
    for (int k = 0; k < 4; ++k) {
      const Words b = load_global(block + 16 * ((k * reads + read) * 32 + lane()));
      UNROLL
      for (int f = 0; f < fragments; ++f) {
        multiply_add<T>(sums[f][k], a[0][f], b.x[0], b.x[1]);
        multiply_add<T>(sums[f][k], a[1][f], b.x[2], b.x[3]);
      }
    }
  }
}

// sums += dA · (32 rows of a table); dA comes from a band by rows, 32 columns of it from `columns` on.
template <class T, class S>
DEVICE void add_table_gradients(float (&sums)[S::kFragments][S::kSize / 8][4], const char* band, int columns,
                                const char* block) {
  uint32_t a[2][S::kFragments][4];
  UNROLL
  for (int step = 0; step < 2; ++step)
    UNROLL
    for (int f = 0; f < S::kFragments; ++f)
      load_matrices(a[step][f], band + kHalf * ((16 * f + lane() % 16) * kRowBandPitch + columns + 16 * step +
                                                8 * (lane() / 16)));
  UNROLL
  for (int n = 0; n < S::kSize / 8; ++n) {
    const Words b = load_global(block + 16 * (n * 32 + lane()));
    UNROLL
    for (int f = 0; f < S::kFragments; ++f) {
      multiply_add<T>(sums[f][n], a[0][f], b.x[0], b.x[1]);
      multiply_add<T>(sums[f][n], a[1][f], b.x[2], b.x[3]);
    }
  }
}

// Block of 32 distances of a head's table, `first` being the first of them, a multiple of 32 from the table's.
DEVICE const char* table_block(const char* table, const Side& side, const Place& place, int first, int block_bytes) {
  const int block = (first - side.first_distance) / kDistances;
  return table + (int64_t{place.head} * side.blocks + block) * block_bytes;
}

// The band by rows of a warp, and the tile's column where it begins. Tiles that follow one another keep what they share.
template <class T, class S, class Left>
DEVICE void write_row_band(char* band, const Call& call, const Place& place, const Side& rows, int first_column,
                           bool follows, Left left) {
  constexpr int block_bytes = kHalf * kDistances * S::kSize;
  const int before = warp() * S::kWarpRows % kDistances;  // rows of a group of 32 that the warp before owns
  const int first = first_column - place.first_row - (warp() * S::kWarpRows - before);
  const EightHalves to(band, row_band(lane() / 4, before + 8 * (lane() % 4)));
  const auto write = [&](int distance) {
    float sums[S::kFragments][4][4] = {};
    add_table_scores<T, S>(sums, table_block(rows.score_table, rows, place, first + distance, block_bytes), left);
    UNROLL
    for (int f = 0; f < S::kFragments; ++f)
      UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t pairs[4];
        as_pairs<T>(pairs, sums[f], half, call.band_scale);
        to.store(kHalf * row_band(16 * f + 8 * half, distance), pairs);
      }
  };
  if (follows) {
    Words overhang[S::kWarpRows / 8];
    const auto cell = [&](int i, int column) {
      return band + kHalf * ((8 * i + lane() / 4) * kRowBandPitch + column + 8 * (lane() % 4));
    };
    UNROLL
    for (int i = 0; i < S::kWarpRows / 8; ++i) overhang[i] = load_shared(cell(i, kColumns));
    UNROLL
    for (int i = 0; i < S::kWarpRows / 8; ++i) store_shared(cell(i, 0), overhang[i]);
  } else {
    write(-kDistances);
  }
  sync_warp();
  write(0);
  write(kDistances);
  sync_warp();
}

// The band by columns of a block; its warps share the work, in turns, and must meet before they read it.
template <class T, class S>
DEVICE void write_column_band(char* band, const Call& call, const Place& place, const Side& columns,
                              const char* column_tile, int first_column, int turn) {
  constexpr int block_bytes = kHalf * kDistances * S::kSize;
  constexpr int blocks = S::kRows / kDistances + 1, groups = kColumns / 32;
  for (int item = (warp() + turn) % S::kWarps; item < groups * blocks; item += S::kWarps) {
    const int group = item % groups, distance = kDistances * (item / groups - 1);
    const char* tile = column_tile + 32 * group * S::kPitch;
    float sums[2][4][4] = {};
    // Here the columns are rows, and distances row minus column.
    const int first = place.first_row - first_column - 32 * group + distance;
    add_table_scores<T, S>(sums, table_block(columns.score_table, columns, place, first, block_bytes),
                           [&](uint32_t (&a)[2][4], int step) {
                             load_left<S>(a[0], tile, 0, step), load_left<S>(a[1], tile, 1, step);
                           });
    const EightHalves to(band, column_band(32 * group + lane() / 4, distance + 8 * (lane() % 4), S::kRows));
    UNROLL
    for (int f = 0; f < 2; ++f)
      UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t pairs[4];
        as_pairs<T>(pairs, sums[f], half, call.band_scale);
        to.store(kHalf * (column_band(16 * f + 8 * half, 0, S::kRows) - column_band(0, 0, S::kRows)), pairs);
      }
  }
}

// Scores of `products` times eight columns begin as the sum of what the bands hold; null where a term is absent.
template <class T, class S, int products>
DEVICE void begin_scores(float (&scores)[S::kFragments][products][4], const char* row_band, const char* column_band,
                         int first_position, float unscale) {
  UNROLL
  for (int f = 0; f < S::kFragments; ++f)
    UNROLL
    for (int group = 0; group < products / 4; ++group) {
      Words by_row[2] = {};
      if (row_band != nullptr)
        UNROLL
        for (int half = 0; half < 2; ++half)
          by_row[half] = load_shared(row_band + kHalf * ((16 * f + 8 * half + lane() / 4) * kRowBandPitch +
                                                         first_position + 32 * group + 8 * (lane() % 4)));
      UNROLL
      for (int k = 0; k < 4; k += 2) {
        uint32_t by_column[4] = {};
        if (column_band != nullptr) {
          const int position = first_position + 32 * group + 8 * (k + lane() / 16) + lane() % 8;
          const int row = 32 + warp() * S::kWarpRows + 16 * f + 8 * (lane() / 8 % 2);
          load_matrices_transposed(by_column, column_band + position * S::kColumnPitch + kHalf * row);
        }
        UNROLL
        for (int w = 0; w < 4; ++w) {
          const uint32_t pair = add_pairs<T>(by_row[w % 2].x[k + w / 2], by_column[w]);
          float(&score)[4] = scores[f][4 * group + k + w / 2];
          score[2 * (w % 2)] = band_factor<T>(unscale) * low<T>(pair);
          score[2 * (w % 2) + 1] = band_factor<T>(unscale) * high<T>(pair);
        }
      }
    }
}

}  // namespace deberta_fast::cuda
