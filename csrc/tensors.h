// Tensors as the kernels of both devices read them: plain structs that do not depend on torch.
#pragma once

#include <cstdint>

namespace deberta_fast {

constexpr double kLog2e = 1.4426950408889634;

constexpr int64_t div_up(int64_t n, int64_t step) { return (n + step - 1) / step; }
constexpr int64_t round_up(int64_t n, int64_t step) { return div_up(n, step) * step; }

enum class Element { float32, bfloat16, float16 };

// (B, H, L, D), or (1, H, T, D) for packed sequences. Strides count elements; the last one is 1.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// (B, H, L) in float32.
struct Statistic {
  float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// The row, key, and head of all heads of all batch rows (or packed sequences) that a call's first ones are in the counter
// of dropout (12), and the number of heads of a batch row there.
struct DropoutOrigin {
  int64_t row = 0, key = 0, batch_head = 0, heads = 0;
};

// K^r or Q^r, (H, rows, D). data is null if the term is absent.
struct Table {
  const void* data = nullptr;
  int64_t head = 0, row = 0;
};

}  // namespace deberta_fast
