// The norm of a sum, y = LayerNorm(x + r), as plain structs. Rows are contiguous and follow one another.
#pragma once

#include "../tensors.h"

namespace deberta_fast {

struct AddNorm {
  Element element;  // of all tensors but the statistics
  int64_t rows, size;
  float eps;
  const void *x, *residual;    // (rows, size)
  const void *weight, *bias;   // (size,)
  void *output, *sum;          // (rows, size); sum may be null
  float *mean, *inverse_root;  // (rows,), m and q of norm.cpp; mean may be null, then neither is stored
};

struct AddNormBackward {
  Element element;
  int64_t rows, size;
  const void *grad_output, *sum;
  const void* weight;
  const float *mean, *inverse_root;
  void* grad_sum;
  // (parts, 2, size): each part's gradients of weight and bias; null if they are not wanted.
  float* partial;
};

constexpr int64_t kNormRows = 16;       // rows that one thread normalises at least
constexpr int64_t kPartRows = 64;       // rows of a part in backward, at least
constexpr int64_t kMostNormParts = 16;  // because the parts' gradients are added

}  // namespace deberta_fast
