// Loads and stores the three element types. All computations are in float32.
#pragma once

#include "vector.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

struct Float32 {
  using Stored = float;
  static INLINE Vector load(const float* p) { return DEBERTA_FAST_ISA::load(p); }
  static INLINE void store(float* p, Vector v) { DEBERTA_FAST_ISA::store(p, v); }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static INLINE Vector load(const uint16_t* p) { return (Vector)(widened(p) << 16); }
  static INLINE void store(uint16_t* p, Vector v) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to the nearest, ties to even
    const Words nan = (bits >> 16) | 0x40u;
    store_narrowed(p, v == v ? rounded : nan);
  }
};

struct Float16 {
  using Stored = uint16_t;
  static INLINE Vector load(const uint16_t* p) {
    const Words half = widened(p);
    const Words moved =
        (half & 0x7fffu) << 13;  // exponent and mantissa in place for float32, with a bias 112 too small
    const Words finite = (Words)((Vector)moved * 0x1p112f);
    return (Vector)((moved >= 0x0f800000u ? moved | 0x7f800000u : finite) | (half & 0x8000u) << 16);
  }
  static INLINE void store(uint16_t* p, Vector v) {
    const Words bits = (Words)v & 0x7fffffffu;
    const Words normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    // Below 2^-14 the spacing is 2^-24, that of float32 between 1/2 and 1, so adding 1/2 rounds.
    const Words subnormal = (Words)((Vector)bits + 0.5f) - 0x3f000000u;
    Words half = bits < 0x38800000u ? subnormal : normal;
    half = bits >= 0x477ff000u ? Words{} + 0x7c00u : half;  // 65520 and more round to infinity
    half = bits > 0x7f800000u ? Words{} + 0x7e00u : half;
    store_narrowed(p, half | ((Words)v >> 16 & 0x8000u));
  }
};

// Calls f with an instance of the element type.
template <class F>
INLINE void with_element(Element element, F f) {
  if (element == Element::float32) return f(Float32{});
  if (element == Element::bfloat16) return f(Bfloat16{});
  return f(Float16{});
}

// Loads the first `count` elements, at most kLanes; the other lanes are zero.
template <class E>
INLINE Vector load_some(const typename E::Stored* p, int64_t count) {
  if (count >= kLanes) return E::load(p);
  typename E::Stored some[kLanes] = {};
  if (count > 0) std::memcpy(some, p, count * sizeof(*p));
  return E::load(some);
}

template <class E>
INLINE void store_some(typename E::Stored* p, Vector v, int64_t count) {
  if (count >= kLanes) return E::store(p, v);
  typename E::Stored some[kLanes];
  E::store(some, v);
  std::memcpy(p, some, count * sizeof(*p));
}

// Copies rows of D elements to float32, zero up to `pitch`: to[r] = scale * row(r).
template <class E, class Row>
void copy_rows(Row row, int64_t count, int64_t size, float scale, float* to, int64_t pitch) {
  for (int64_t r = 0; r < count; ++r, to += pitch) {
    const auto* from = row(r);
    for (int64_t d = 0; d < pitch; d += kLanes) store(to + d, load_some<E>(from + d, size - d) * scale);
  }
}

// Transposes rows: to[d][r] = scale * row(r)[d]. Both counts are rounded up to whole vectors, with zeros in the
// padding.
template <class E, class Row>
void transpose_rows(Row row, int64_t count, int64_t size, float scale, float* to, int64_t pitch) {
  for (int64_t r = 0; r < count; r += kLanes) {
    for (int64_t d = 0; d < size; d += kLanes) {
      Vector block[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        block[l] = r + l < count ? load_some<E>(row(r + l) + d, size - d) * scale : Vector{};
      }
      transpose(block);
      for (int64_t l = 0; l < kLanes; ++l) store(to + (d + l) * pitch + r, block[l]);
    }
  }
}

// Stores rows: row(r) = scale * from[r], rounded.
template <class E, class Row>
void store_rows(const float* from, int64_t pitch, int64_t count, int64_t size, float scale, Row row) {
  for (int64_t r = 0; r < count; ++r, from += pitch) {
    auto* to = row(r);
    for (int64_t d = 0; d < size; d += kLanes) store_some<E>(to + d, load(from + d) * scale, size - d);
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
