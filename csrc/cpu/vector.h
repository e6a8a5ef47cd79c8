// A vector of floats of the register width that this file is compiled for, by the compiler's vector extensions. The
// same source serves AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "params.h"

#ifndef DEBERTA_FAST_ISA
#error "compile with -DDEBERTA_FAST_ISA=plain, avx2, avx512, avx512_bf16 or amx"
#endif

// One library has the kernels of several instruction sets, each in its own namespace.
namespace deberta_fast::DEBERTA_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kPanel = 4;  // kPanel: vectors per row of a product in registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kPanel = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kPanel = 4;
#else
constexpr int kVectorBytes = 16, kPanel = 2;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
// The same in memory at any address, aliasing any type.
typedef Vector AnyVector __attribute__((aligned(4), may_alias));
typedef Halves AnyHalves __attribute__((aligned(2), may_alias));
typedef Bytes AnyBytes __attribute__((aligned(1), may_alias));

#define INLINE inline __attribute__((always_inline))

constexpr int64_t round_down(int64_t n, int64_t step) { return n / step * step; }

INLINE Vector load(const float* p) { return *reinterpret_cast<const AnyVector*>(p); }
INLINE void store(float* p, Vector v) { *reinterpret_cast<AnyVector*>(p) = v; }
// An addition would turn -0 into 0.
INLINE Vector broadcast(float x) { return x - Vector{}; }
INLINE Vector max(Vector a, Vector b) { return a > b ? a : b; }

namespace detail {

// The lane of (a, b) that one step of a transposition puts here. It exchanges blocks of `half` lanes.
constexpr int exchanged(int lane, int half, bool upper) {
  const int within = lane & (half - 1), block = lane & ~(2 * half - 1);
  return block + within + (upper ? half : 0) + ((lane & half) ? kLanes : 0);
}

template <int half, bool upper, int... lane>
INLINE Vector exchange(Vector a, Vector b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, exchanged(lane, half, upper)...);
}

template <int half, int... lane>
INLINE Vector swap_halves(Vector v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ half)...);
}

using AllLanes = std::make_integer_sequence<int, kLanes>;

template <int half>
INLINE void transpose_steps(Vector (&rows)[kLanes]) {
  if constexpr (half > 0) {
    for (int r = 0; r < kLanes; ++r) {
      if (r & half) continue;
      const Vector a = rows[r], b = rows[r + half];
      rows[r] = exchange<half, false>(a, b, AllLanes{});
      rows[r + half] = exchange<half, true>(a, b, AllLanes{});
    }
    transpose_steps<half / 2>(rows);
  }
}

template <int half, class Combine>
INLINE Vector reduce_steps(Vector v, Combine combine) {
  if constexpr (half > 0) {
    return reduce_steps<half / 2>(combine(v, swap_halves<half>(v, AllLanes{})), combine);
  } else {
    return v;
  }
}

}  // namespace detail

// rows[r][c] becomes rows[c][r].
INLINE void transpose(Vector (&rows)[kLanes]) { detail::transpose_steps<kLanes / 2>(rows); }

// The compiler would divide these conversions of AVX-512 into four.
INLINE Words widened(const uint16_t* p) {
  const Halves halves = *reinterpret_cast<const AnyHalves*>(p);
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);
#else
  return __builtin_convertvector(halves, Words);
#endif
}
INLINE void store_narrowed(uint16_t* p, Words words) {
#if defined(__AVX512F__)
  *reinterpret_cast<AnyHalves*>(p) = (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
#else
  *reinterpret_cast<AnyHalves*>(p) = __builtin_convertvector(words, Halves);
#endif
}

INLINE float sum(Vector v) {
  return detail::reduce_steps<kLanes / 2>(v, [](Vector a, Vector b) { return a + b; })[0];
}
INLINE float maximum(Vector v) {
  return detail::reduce_steps<kLanes / 2>(v, [](Vector a, Vector b) { return max(a, b); })[0];
}

// cells[runs[l]] in lane l, where `runs` rise from lane to lane by at most 1. Reads kLanes cells from cells[runs[0]] on.
INLINE Vector spread(const float* cells, const int32_t* runs) {
  cells += runs[0];
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_sub_epi32(_mm512_loadu_si512(runs), _mm512_set1_epi32(runs[0]));
  return (Vector)_mm512_maskz_permutexvar_ps(0xffff, lanes, (__m512)load(cells));
#elif defined(__AVX2__)
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(runs));
  return (Vector)_mm256_permutevar8x32_ps((__m256)load(cells), _mm256_sub_epi32(all, _mm256_set1_epi32(runs[0])));
#else
  if (runs[kLanes - 1] - runs[0] == kLanes - 1) return load(cells);
  Vector v;
  for (int l = 0; l < kLanes; ++l) v[l] = cells[runs[l] - runs[0]];
  return v;
#endif
}

// 2^x with a relative error of 2e-8 before rounding; 0 below -126 and for minus infinity. NaN stays NaN.
INLINE Vector exp2(Vector x) {
#if defined(__AVX512F__)
  const Vector n = (Vector)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vector f = x - n;
#else
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  x = x < -126.0f ? broadcast(-127.0f) : x;
  const Vector shifted = x + kRound;
  const Vector f = x - (shifted - kRound);
#endif
  // The minimax polynomial of the relative error over [-1/2, 1/2], by Remez's algorithm.
  Vector p = f * 0x1.41d334p-13f + 0x1.5f456ap-10f;
  p = p * f + 0x1.3b2dbcp-7f;
  p = p * f + 0x1.c6aed4p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e43p-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vector)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const Words power = ((Words)shifted + 127u) << 23;
  return p * (Vector)power;
#endif
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
