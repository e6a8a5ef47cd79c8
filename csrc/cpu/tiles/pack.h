// Copies of bfloat16 matrices as operands of products: rows with zeros around them, pairs of rows interleaved, and
// transposed matrices. A word is a pair of numbers that a product reads together.
#pragma once

#include "../block.h"
#include "product.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

constexpr int64_t kPaddedRows = 32;  // operands have a multiple of so many rows

INLINE float* words(uint16_t* data) { return reinterpret_cast<float*>(data); }
INLINE const float* words(const uint16_t* data) { return reinterpret_cast<const float*>(data); }

// to[c][r] = from[r][c] for 16 x 16 words; pitches count words.
INLINE void transpose_words(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  for (int r = 0; r < kTile; r += kLanes) {
    for (int c = 0; c < kTile; c += kLanes) {
      Vector square[kLanes];
      for (int l = 0; l < kLanes; ++l) square[l] = load(from + (r + l) * from_pitch + c);
      transpose(square);
      for (int l = 0; l < kLanes; ++l) store(to + (c + l) * to_pitch + r, square[l]);
    }
  }
}

// Rounds as Bfloat16::store does, but for denormals, which become zero where the processor has an instruction.
INLINE void store_rounded(uint16_t* p, Vector v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  Bfloat16::store(p, v);
#endif
}

// Returns kLanes words (upper[c], lower[c]).
INLINE Vector interleaved(const uint16_t* upper, const uint16_t* lower) {
  return (Vector)(widened(upper) | widened(lower) << 16);
}

// Writes `count` of these words, a multiple of kLanes.
INLINE void interleave(const uint16_t* upper, const uint16_t* lower, int64_t count, uint16_t* to) {
  for (int64_t c = 0; c < count; c += kLanes) store(words(to + 2 * c), interleaved(upper + c, lower + c));
}

// Copies a row of D numbers, with zeros up to `pitch`.
INLINE void copy_row(const uint16_t* from, int64_t size, uint16_t* to, int64_t pitch) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= size; d += 2 * kLanes) store(words(to + d), load(words(from + d)));
  for (; d < size; ++d) to[d] = from[d];
  for (; d < pitch; ++d) to[d] = 0;
}

// Copies rows of D numbers to (count rounded up to kPaddedRows, pitch) with zeros in the padding.
template <class Row>
void copy_padded(Row row, int64_t count, int64_t size, uint16_t* to, int64_t pitch) {
  const int64_t padded = round_up(count, kPaddedRows);
  for (int64_t r = 0; r < count; ++r) copy_row(row(r), size, to + r * pitch, pitch);
  std::fill_n(to + count * pitch, (padded - count) * pitch, uint16_t{0});
}

// Interleaves rows 2r and 2r + 1 for products that sum over rows.
inline void pair_rows(const uint16_t* rows, int64_t count, int64_t pitch, uint16_t* to) {
  for (int64_t r = 0; r < round_up(count, kPaddedRows); r += 2) {
    interleave(rows + r * pitch, rows + (r + 1) * pitch, pitch, to + r * pitch);
  }
}

// Packs the transposed matrix, for products that sum over D, in tiles: (rows / 16, D / 32, 16, 16 words).
inline void pack_transposed(const uint16_t* rows, int64_t count, int64_t size, uint16_t* to) {
  for (int64_t r = 0; r < round_up(count, kPaddedRows); r += kTile) {
    for (int64_t d = 0; d < size; d += kDepth) {
      transpose_words(words(rows + r * size + d), size / 2, words(to + r * size + kTile * d), kTile);
    }
  }
}

INLINE Right packed(const uint16_t* data, int64_t size) { return {data, kDepth, kTile * kDepth, kTile * size}; }

// Transposes (rows, columns), multiples of 32 and 16, to (columns, rows); pitches count numbers.
inline void transpose_halves(const uint16_t* from, int64_t from_pitch, int64_t rows, int64_t columns, uint16_t* to,
                             int64_t to_pitch) {
  for (int64_t r = 0; r < rows; r += 2 * kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vector square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        const uint16_t* const upper = from + (r + 2 * l) * from_pitch + c;
        square[l] = interleaved(upper, upper + from_pitch);
      }
      transpose(square);
      for (int64_t l = 0; l < kLanes; ++l) store(words(to + (c + l) * to_pitch + r), square[l]);
    }
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
