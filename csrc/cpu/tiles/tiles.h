// Tiles of 16 rows of 64 bytes and their product, C += A B, after Intel's AMX (Software Developer's Manual, volume 2):
//
//     C_mn += sum_p A_m,2p B_p,2n + sum_p A_m,2p+1 B_p,2n+1        p < 16; C (16, 16) float32, A (16, 32) bfloat16
//
// B has two neighbouring rows of its matrix in each of its own rows, interleaved. Three implementations of the same
// primitives follow, of which the compiler's flags choose one: AMX, the dot products of AVX-512 BF16, and plain C++,
// which rounds as AMX does.
#pragma once

#include <cmath>

#include "../vector.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

constexpr int kTile = 16;   // rows of a tile, and columns of C
constexpr int kDepth = 32;  // columns of A

#if defined(__AMX_BF16__)

// The tiles 0 to 3 are sums, 4 and 5 left operands, 6 and 7 right ones.
constexpr int kTileRows = 2, kTileColumns = 2;

// Configures the thread's tiles, and puts back what was configured before, which may be torch's.
class TileConfiguration {
 public:
  TileConfiguration() {
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    Layout ours;
    for (int t = 0; t < 8; ++t) ours.row_bytes[t] = 64, ours.rows[t] = kTile;
    asm volatile("ldtilecfg %0" ::"m"(ours) : "memory");
  }
  // Palette 0 in `before_` releases the tiles.
  ~TileConfiguration() { asm volatile("ldtilecfg %0" ::"m"(before_) : "memory"); }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;

 private:
  struct Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Layout) == 64);
  Layout before_;
};

// Strides count elements.
struct Tiles {
  template <int t>
  INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  INLINE void load(const float* data, int64_t row) {
    load_bytes<t>(data, 4 * row);
  }
  template <int t>
  INLINE void load(const uint16_t* data, int64_t row) {
    load_bytes<t>(data, 2 * row);
  }
  template <int t>
  INLINE void store(float* data, int64_t row) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(4 * row), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }

 private:
  template <int t>
  INLINE void load_bytes(const void* data, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(t) : "memory");
  }
};

#else

constexpr int kTileRows = 1, kTileColumns = 1;  // more sums would not stay in registers

struct TileConfiguration {
  TileConfiguration() {}  // not trivial, as the compiler would warn of an unused variable
};

#if defined(__AVX512BF16__)

// An operand stays in memory until it is multiplied.
struct Tiles {
  template <int t>
  INLINE void zero() {
    for (int m = 0; m < kTile; ++m) sums_[m] = Vector{};
  }
  template <int t>
  INLINE void load(const float* data, int64_t row) {
    for (int m = 0; m < kTile; ++m) sums_[m] = DEBERTA_FAST_ISA::load(data + m * row);
  }
  template <int t>
  INLINE void load(const uint16_t* data, int64_t row) {
    operands_[t / 6] = {data, row};
  }
  template <int t>
  INLINE void store(float* data, int64_t row) {
    for (int m = 0; m < kTile; ++m) DEBERTA_FAST_ISA::store(data + m * row, sums_[m]);
  }
  template <int c, int a, int b>
  INLINE void multiply() {
    const auto [left, left_row] = operands_[0];
    const auto [right, right_row] = operands_[1];
    for (int p = 0; p < kTile; ++p) {
      const Vector row_of_b = DEBERTA_FAST_ISA::load(reinterpret_cast<const float*>(right + p * right_row));
#pragma GCC unroll 16
      for (int m = 0; m < kTile; ++m) {
        uint32_t pair;
        std::memcpy(&pair, left + m * left_row + 2 * p, 4);
        sums_[m] = (Vector)_mm512_dpbf16_ps((__m512)sums_[m], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)row_of_b);
      }
    }
  }

 private:
  struct Operand {
    const uint16_t* data;
    int64_t row;
  };
  Vector sums_[kTile];
  Operand operands_[2];
};

#else

struct Tiles {
  template <int t>
  INLINE void zero() {
    std::memset(sums_, 0, sizeof(sums_));
  }
  template <int t>
  INLINE void load(const float* data, int64_t row) {
    for (int m = 0; m < kTile; ++m) std::memcpy(sums_[m], data + m * row, sizeof(sums_[m]));
  }
  template <int t>
  INLINE void load(const uint16_t* data, int64_t row) {
    for (int m = 0; m < kTile; ++m) {
      for (int p = 0; p < kDepth; ++p) operands_[t / 6][m][p] = value_of(data[m * row + p]);
    }
  }
  template <int t>
  INLINE void store(float* data, int64_t row) {
    for (int m = 0; m < kTile; ++m) std::memcpy(data + m * row, sums_[m], sizeof(sums_[m]));
  }
  template <int c, int a, int b>
  INLINE void multiply() {
    const auto& [left, right] = operands_;
    for (int m = 0; m < kTile; ++m) {
      float even[kTile] = {}, odd[kTile] = {};
      for (int p = 0; p < kTile; ++p) {
        for (int n = 0; n < kTile; ++n) {  // products of two bfloat16 numbers are exact
          even[n] = flushed(even[n] + left[m][2 * p] * right[p][2 * n]);
          odd[n] = flushed(odd[n] + left[m][2 * p + 1] * right[p][2 * n + 1]);
        }
      }
      for (int n = 0; n < kTile; ++n) sums_[m][n] = flushed(sums_[m][n] + flushed(even[n] + odd[n]));
    }
  }

 private:
  // Denormal operands and results become zero.
  static INLINE float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
  static INLINE float value_of(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return flushed(value);
  }

  float sums_[kTile][kTile], operands_[2][kTile][kDepth];
};

#endif
#endif

}  // namespace deberta_fast::DEBERTA_FAST_ISA
