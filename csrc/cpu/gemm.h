// Products of small matrices, C = In + A B. The rows of B, C and In are read and written in vectors. A is read one
// element at a time and broadcast, so it may have any two strides: it may be transposed, or lie along the diagonals of
// a tile of scores. The skew of the position terms is such a stride of A, or the pitch of In.
#pragma once

#include "vector.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

constexpr int kStrip = 6;  // rows of C that are summed in registers, kPanel vectors each

// Element (r, p) of A is data[r * row + p * step].
struct Operand {
  const float* data;
  int64_t row, step;
  Operand from_row(int64_t r) const { return {data + r * row, row, step}; }
};

namespace detail {

using Micro = void (*)(int64_t, Operand, const float*, int64_t, const float*, int64_t, float*, int64_t);

// Sums `rows` rows of C, `vectors` vectors wide, in registers.
template <int rows, int vectors>
void micro(int64_t depth, Operand a, const float* b, int64_t b_pitch, const float* in, int64_t in_pitch, float* c,
           int64_t c_pitch) {
  Vector sums[rows][vectors] = {};
  for (int64_t p = 0; p < depth; ++p, a.data += a.step, b += b_pitch) {
    Vector row_of_b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row_of_b[v] = load(b + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const Vector element = broadcast(a.data[r * a.row]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += element * row_of_b[v];
    }
  }
  // In is added last, because a sum that begins with a large term is rounded more at every step.
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      if (in) sums[r][v] += load(in + r * in_pitch + v * kLanes);
      store(c + r * c_pitch + v * kLanes, sums[r][v]);
    }
  }
}

// kMicro[rows - 1][vectors - 1]. No product is wider than kPanel vectors, so the entries beyond repeat that one.
template <int vectors>
constexpr int kAtMostPanel = vectors < kPanel ? vectors : kPanel;
template <int rows>
constexpr Micro kMicroOfRows[4] = {micro<rows, 1>, micro<rows, kAtMostPanel<2>>, micro<rows, kAtMostPanel<3>>,
                                   micro<rows, kAtMostPanel<4>>};
constexpr const Micro* kMicro[kStrip] = {kMicroOfRows<1>, kMicroOfRows<2>, kMicroOfRows<3>,
                                         kMicroOfRows<4>, kMicroOfRows<5>, kMicroOfRows<6>};

}  // namespace detail

// C (rows, columns) = In + A B, where A is (rows, depth). Reads and writes columns rounded up to whole vectors. In may
// be C, or null for zero.
inline void gemm(int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b, int64_t b_pitch,
                 const float* in, int64_t in_pitch, float* c, int64_t c_pitch) {
  const int64_t vectors = div_up(columns, kLanes), panels = div_up(vectors, kPanel);
  for (int64_t p = 0; p < panels; ++p) {
    // Panels have equal widths, because a narrow last one would leave units idle.
    const int64_t v = vectors * p / panels, panel = vectors * (p + 1) / panels - v, column = v * kLanes;
    for (int64_t r = 0; r < rows; r += kStrip) {
      const int64_t strip = rows - r < kStrip ? rows - r : kStrip;
      detail::kMicro[strip - 1][panel - 1](depth, a.from_row(r), b + column, b_pitch,
                                           in ? in + r * in_pitch + column : nullptr, in_pitch,
                                           c + r * c_pitch + column, c_pitch);
    }
  }
}

// C += A B in sums of at most kDepth products, because rounding grows with the length of a sum.
constexpr int64_t kDepth = 128;
inline void gemm_add(int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b, int64_t b_pitch, float* c,
                     int64_t c_pitch) {
  const int64_t parts = div_up(depth, kDepth);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t p = depth * part / parts, next = depth * (part + 1) / parts;
    gemm(rows, columns, next - p, {a.data + p * a.step, a.row, a.step}, b + p * b_pitch, b_pitch, c, c_pitch, c,
         c_pitch);
  }
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
