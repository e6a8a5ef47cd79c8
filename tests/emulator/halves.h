// Converts between float and halves of a word, bit for bit as the GPU does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace deberta_fast {
namespace emulator {

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class T>
struct Half;

template <>
struct Half<Bfloat16> {
  static float widen(uint32_t half) { return as_float(half << 16); }

  static uint32_t round(float x) {
    const uint32_t bits = as_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};

template <>
struct Half<Float16> {
  static float widen(uint32_t half) {
    // The bias of the exponent differs by 112. The exponent of infinity and NaN must stay the largest.
    const float x = as_float((half & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    return as_float(as_bits(x) | special | (half & 0x8000) << 16);
  }

  static uint32_t round(float x) {
    const uint32_t sign = as_bits(x) >> 16 & 0x8000;
    const uint32_t bits = as_bits(x) & 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fff;
    if (bits >= 0x477ff000u) return sign | 0x7c00;  // 65520 and more
    // Below 2^-14, the sum with 1/2 has the last place of a subnormal half, so the addition rounds.
    if (bits < 0x38800000u) return sign | (as_bits(as_float(bits) + 0.5f) - 0x3f000000u);
    return sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
  }
};

}  // namespace emulator

template <class T>
inline uint32_t pack(float low, float high) {
  return emulator::Half<T>::round(low) | emulator::Half<T>::round(high) << 16;
}
template <class T>
inline float low(uint32_t pair) {
  return emulator::Half<T>::widen(pair & 0xffff);
}
template <class T>
inline float high(uint32_t pair) {
  return emulator::Half<T>::widen(pair >> 16);
}
// A float has at least 2 p + 2 binary places for the p places of a half, so rounding to float first changes nothing.
template <class T>
inline uint32_t add_pairs(uint32_t a, uint32_t b) {
  return pack<T>(low<T>(a) + low<T>(b), high<T>(a) + high<T>(b));
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline int lowest_bit(uint32_t x) { return __builtin_ffs(static_cast<int>(x)) - 1; }
inline float infinity() { return emulator::as_float(0x7f800000); }

}  // namespace deberta_fast
